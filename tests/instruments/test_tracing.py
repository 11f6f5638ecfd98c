"""Causal tracing: noise at the subject, and one place put back."""

import numpy as np
import pytest
import torch

from headwise.instruments.tracing import Probability, trace
from headwise.models import Site, UnsupportedModelError, recording, sites_of, touching, view
from tests.instruments import tiny

N, SUBJECT = 7, [1, 2]


@torch.no_grad()
def slowly(model, ids, answer, kind, window, size, samples, seed):
    """Each place on its own, in plain runs of one noise each."""
    look, first = view(model), Site("residual", 0)
    sites = sites_of(look, kind)
    with recording(look, [*sites, first]) as kept:
        clean = model(ids).logits[0, -1].softmax(-1)[answer].item()
    kept = dict(kept)
    random = torch.Generator().manual_seed(1_000_003 * seed)
    noise = size * torch.randn(samples, len(SUBJECT), kept[first].shape[-1], generator=random)
    table = np.zeros((len(sites) + 1, ids.shape[1]))
    for layer in range(len(sites) + 1):  # the last restores nothing
        near = sites[max(0, layer - window // 2) : layer + (window + 1) // 2]
        for position in range(ids.shape[1]):
            for one in noise:

                def drown(there, one=one):
                    made = there.clone()
                    made[0, SUBJECT] += one
                    return made

                def putting(site, position=position):
                    def write(there):
                        made = there.clone()
                        made[:, position] = kept[site][:, position]
                        return made

                    return write

                writes = {s: putting(s) for s in near} if layer < len(sites) else {}
                with touching(look, {first: drown}), touching(look, writes):
                    found = model(ids).logits[0, -1].softmax(-1)[answer].item()
                table[layer, position] += found / samples
    return table[:-1], clean, table[-1, 0]


@pytest.mark.parametrize("make", [tiny.gpt2, lambda: tiny.llama(num_hidden_layers=4)])
@pytest.mark.parametrize(("kind", "window"), [("residual", 1), ("mlp", 3), ("attention", 2)])
def test_every_place_is_a_plain_run_with_noise_and_one_place_put_back(make, kind, window):
    model, ids = make(), tiny.ids(N)
    with torch.no_grad():
        answer = int(model(ids).logits[0, -1].argmax())
    more = {"window": window, "noise": 2.0, "spread": 0.5, "samples": 3, "seed": 4}
    table = trace(model, ids, SUBJECT, answer, kind, pass_tokens=100, **more)
    expected, clean, corrupted = slowly(model, ids, answer, kind, window, 1.0, 3, 4)
    np.testing.assert_allclose(table.values, expected, atol=1e-4)
    assert table.clean[0] == pytest.approx(clean, abs=1e-5)
    assert table.corrupted[0] == pytest.approx(corrupted, abs=1e-5)
    assert abs(clean - corrupted) > 0.01
    assert list(table.axes) == ["layer", "position"]


def test_the_answer_is_restored_at_the_subject_first_and_at_the_end_last():
    """What the first layer reads, put back at all subject tokens, is the clean run; the last
    residual at the last position is all that the answer is read from."""
    model, ids = tiny.gpt2(), tiny.ids(N)
    answer = int(ids[0, 0])
    table = trace(model, ids, [2], answer, noise=8.0, samples=4)
    assert table.values[0, 2] == pytest.approx(table.clean[0], abs=1e-5)
    assert table.values[-1, -1] == pytest.approx(table.clean[0], abs=1e-5)
    np.testing.assert_allclose(table.values[-1, :-1], table.corrupted[0], atol=1e-5)
    np.testing.assert_allclose(table.values[:, :2], table.corrupted[0], atol=1e-5)  # before it


def test_noise_is_measured_in_what_the_subjects_are():
    model, ids = tiny.llama(), tiny.ids(N, batch=2)
    with torch.no_grad():
        rows = model.model.embed_tokens(ids)[:, SUBJECT]
    table = trace(model, ids, SUBJECT, torch.tensor([3, 4]), samples=2)
    assert table.provenance["spread"] == pytest.approx(rows.std().item(), rel=1e-5)
    same = trace(model, ids, SUBJECT, torch.tensor([3, 4]), samples=2)
    np.testing.assert_array_equal(table.examples, same.examples)
    other = trace(model, ids, SUBJECT, torch.tensor([3, 4]), samples=2, seed=1)
    assert np.abs(table.examples - other.examples).max() > 1e-4


def test_subjects_at_places_of_their_own():
    model = tiny.gpt2()
    long, short = tiny.ids(7, 1), tiny.ids(5, 2)
    given = {"samples": 2, "spread": 1.0, "positions": {"end": -1, "first": 0}}
    table = trace(model, [long, short], [[1, 2], [-2]], torch.tensor([3, 4]), **given)
    assert table.axes["position"] == ("end", "first")
    alone = trace(model, long, [1, 2], 3, **given)
    np.testing.assert_allclose(table.examples[0], alone.examples[0], atol=1e-5)
    with pytest.raises(ValueError, match="several lengths"):
        trace(model, [long, short], [0], 3, samples=1)


def test_positions_at_places_of_their_own():
    """A named position may stand elsewhere in each example: it is that example's column."""
    model, ids = tiny.gpt2(), torch.randint(0, tiny.VOCABULARY, (3, 7))
    places = [1, 4, 2]
    given = {"inputs": {"input_ids": ids}, "subject": [[at] for at in places], "answer": 5}
    named = trace(model, **given, positions={"subject": torch.tensor(places)}, samples=2)
    whole = trace(model, **given, samples=2)
    for number, at in enumerate(places):
        np.testing.assert_allclose(named.examples[number, :, 0], whole.examples[number, :, at])


def test_probability():
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = Probability(torch.tensor([3, 8])).score(logits, {"attention_mask": mask})
    assert found[0] == logits[0, 4].softmax(-1)[3]
    assert found[1] == logits[1, 1].softmax(-1)[8]


def test_what_cannot_be_done_is_said():
    model, ids = tiny.gpt2(), tiny.ids(N)
    for given, told in (
        ({"subject": [9]}, "among its 7 tokens"),
        ({"subject": []}, "among its 7 tokens"),
        ({"subject": [[1], [2]]}, "2 subjects for 1"),
        ({"site": "heads"}, "site='heads'"),
        ({"samples": 0}, "samples=0"),
        ({"noise": 0.0}, "noise=0.0"),
        ({"window": 0}, "window=0"),
    ):
        with pytest.raises(ValueError, match=told):
            trace(model, ids, **{"subject": SUBJECT, "answer": 3, **given})
    with pytest.raises(UnsupportedModelError, match="one stack"):
        trace(tiny.bart(), ids, SUBJECT, 3)


def test_nothing_is_left_behind():
    model, ids = tiny.llama(), tiny.ids(N)
    with torch.no_grad():
        before = model(ids).logits
    trace(model, ids, SUBJECT, 3, "mlp", samples=2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
