import math

import pytest
import torch

from headwise.compress import layer_similarity
from tests.instruments import tiny

torch.set_num_threads(1)


def _angles(model, ids, which):
    """By hand: hidden states of transformers' own, every pair of places, every token."""
    states = tiny.outputs(model, {"input_ids": ids}).hidden_states[:-1]
    # the last hidden state of transformers is normalised already: take what the last layer gives
    last = []
    hook = model.model.layers[-1].register_forward_hook(lambda m, a, o: last.append(o))
    with torch.no_grad():
        model(ids)
    hook.remove()
    out = last[0][0] if isinstance(last[0], tuple) else last[0]
    states = [*states, out]
    places = range(ids.shape[1]) if which == "all" else [ids.shape[1] - 1]
    found = {}
    for start in range(len(states)):
        for stop in range(start + 1, len(states)):
            total = []
            for row in range(len(ids)):
                for place in places:
                    a, b = states[start][row, place].double(), states[stop][row, place].double()
                    cosine = float(a @ b / a.norm() / b.norm())
                    total.append((math.acos(cosine) / math.pi, cosine))
            found[start, stop] = torch.tensor(total).mean(0).tolist()
    return found


@pytest.mark.parametrize("which", ["all", "last"])
def test_against_loops(which):
    model, ids = tiny.llama(num_hidden_layers=4), tiny.ids(9, batch=3)
    got = layer_similarity(model, {"input_ids": ids}, which, batch_size=2)
    for (start, stop), (angle, cosine) in _angles(model, ids, which).items():
        assert float(got.angular[stop - start - 1, start]) == pytest.approx(angle, abs=1e-5)
        assert float(got.cosine[stop - start - 1, start]) == pytest.approx(cosine, abs=1e-5)
    assert torch.isnan(got.angular[2, 2:]).all()
    torch.testing.assert_close(got.influence, 1 - got.cosine[0])


def test_layers_that_do_little_are_found():
    model = tiny.llama(num_hidden_layers=6)
    with torch.no_grad():
        for layer in (2, 3):
            for part in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp):
                for weight in part.parameters():
                    weight *= 0.01
    got = layer_similarity(model, {"input_ids": tiny.ids(20, batch=2)})
    assert got.span(2) == (2, 3)
    assert got.least(2) == (2, 3)
    with pytest.raises(ValueError, match="6 of 6 layers"):
        got.span(6)


def test_padding_does_not_count():
    model, ids = tiny.llama(), tiny.ids(10, batch=1)
    longer = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 10 + [0] * 4])
    for which in ("all", "last"):
        alone = layer_similarity(model, {"input_ids": ids}, which)
        padded = layer_similarity(model, {"input_ids": longer, "attention_mask": mask}, which)
        torch.testing.assert_close(alone.cosine, padded.cosine, equal_nan=True, atol=1e-5, rtol=0)


def test_words_that_do_not_fit():
    model = tiny.llama(num_hidden_layers=3)
    with pytest.raises(ValueError, match="tokens_of_each"):
        layer_similarity(model, {"input_ids": tiny.ids(8)}, "some")


def test_models_with_several_stacks_say_which():
    model = tiny.bart()
    given = {"input_ids": tiny.ids(8), "decoder_input_ids": tiny.ids(5)}
    assert layer_similarity(model, given).stack == "decoder"
    assert layer_similarity(model, given, stack="encoder").angular.shape == (2, 2)
    with pytest.raises(ValueError, match="encoder, decoder"):
        layer_similarity(model, given, stack="vision")
