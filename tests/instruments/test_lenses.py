"""The logit lens against plain loops in float64, and against what models answer."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from headwise.instruments.lenses import lens
from headwise.instruments.readout import Readout
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.parts import Attention, Rotary
from tests.instruments import tiny


def gemma2():
    config = Gemma2Config(
        **tiny.SIZE, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0
    )
    return tiny._sharp(Gemma2ForCausalLM(config))


def own():
    torch.manual_seed(0)
    model = Decoder(
        tiny.VOCABULARY,
        32,
        3,
        mixer=lambda layer: Attention(32, 4, position=Rotary(), causal=True),
    )
    nn.init.normal_(model.embed.weight, std=0.5)
    return model.eval()


MODELS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "gemma2": gemma2,
    "gpt_oss": tiny.gpt_oss,
    "own": own,
    "bert": tiny.bert,
}


def inputs_of(name):
    ids = tiny.ids(13, batch=3)
    if name == "bart":
        return {"input_ids": ids, "decoder_input_ids": tiny.ids(9, 1, 3)}
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator())}
    return {"input_ids": ids}


@pytest.mark.parametrize("name", [*MODELS, "bart", "vit"])
def test_the_last_layer_gives_the_models_own_answer(name):
    model = getattr(tiny, name)() if name in ("bart", "vit") else MODELS[name]()
    read = Readout(view(model), inputs_of(name))
    with torch.no_grad():
        out = model(**inputs_of(name))
        expected = getattr(out, "logits", out)
        assert (read(read.last) - expected).abs().max() < 1e-4
    assert read.by_row == (name != "vit")
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_every_number_is_what_loops_give(name):
    model, ids = MODELS[name](), tiny.ids(13, batch=3)
    found = lens(model, ids, top=3, block=4)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    norm = view(model).final_norm
    table = model.lm_head.weight.double()
    states = list(out.hidden_states)
    assert found.loss.shape == (len(states), 39)
    for layer, state in enumerate(states):
        for row in range(39):
            b, p = divmod(row, 13)
            assert (found.example[row], found.position[row]) == (b, p)
            last = layer == len(states) - 1
            with torch.no_grad():  # transformers hands out the last state behind the norm
                x = state[b, p] if last else norm(state[b, p][None, None])[0, 0]
            logits = (table @ x.double()).detach()
            if name == "gemma2":
                logits = 3 * torch.tanh(logits / 3)
            p_now = (logits.exp() / logits.exp().sum()).numpy()
            p_end = out.logits[b, p].double().softmax(-1).numpy()
            kl = sum(e * math.log(e / n) for e, n in zip(p_end, p_now, strict=True))
            assert found.kl[layer, row] == pytest.approx(kl, abs=1e-4)
            entropy = -sum(n * math.log(n) for n in p_now)
            assert found.entropy[layer, row] == pytest.approx(entropy, abs=1e-4)
            order = np.argsort(-p_now)
            assert found.top[layer, row].tolist() == order[:3].tolist()
            assert found.top_probability[layer, row, 0] == pytest.approx(p_now.max(), abs=1e-5)
            if p == 12:
                assert found.target[row] == -1
                assert found.rank[layer, row] == -1
                assert np.isnan(found.loss[layer, row])
                continue
            right = int(ids[b, p + 1])
            assert found.target[row] == right
            assert found.probability[layer, row] == pytest.approx(p_now[right], abs=1e-5)
            assert found.rank[layer, row] == order.tolist().index(right)


def test_blocks_and_batches_change_nothing():
    model, ids = own(), tiny.ids(13, batch=5)
    whole = lens(model, ids, block=1000)
    parts = lens(model, ids, block=3, batch_size=2)
    for name in ("loss", "rank", "top", "entropy", "kl", "example", "position", "target"):
        assert np.allclose(getattr(whole, name), getattr(parts, name), atol=1e-5, equal_nan=True)


def test_padding_is_left_out():
    model, ids = tiny.llama(), tiny.ids(9, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = lens(model, {"input_ids": ids, "attention_mask": mask})
    alone = lens(model, ids[1:, :6])
    assert len(found.example) == 15
    rows = found.rows_of(1)
    assert np.allclose(found.loss[:, rows], alone.loss, atol=1e-5, equal_nan=True)
    assert found.target[rows][-1] == -1


def test_a_classifier_is_read_once_an_example():
    model = tiny.vit()
    pixels = torch.randn(5, 3, 32, 32)
    found = lens(model, {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1, 0, 1])})
    with torch.no_grad():
        logs = model(pixels).logits.log_softmax(-1)
    assert found.loss[-1] == pytest.approx(-logs[range(5), [0, 1, 1, 0, 1]].numpy(), abs=1e-5)
    assert found.words == {0: "LABEL_0", 1: "LABEL_1"}
    assert (found.position == -1).all()
    same = lens(model, pixels, target=torch.tensor([0, 1, 1, 0, 1]))
    assert np.array_equal(same.loss, found.loss)


def test_targets_can_be_said():
    model, ids = tiny.gpt2(), tiny.ids(6, batch=2)
    final = lens(model, ids, target="final")
    assert (final.rank[-1] == 0).all()
    mine = torch.full((2, 6), -1)
    mine[1, 3] = 17
    found = lens(model, ids, target=mine)
    assert (found.target >= 0).sum() == 1
    assert found.by_layer()["loss"][-1] == pytest.approx(found.loss[-1, 9])
    with pytest.raises(ValueError, match="expected"):
        lens(model, ids, target=mine[:, :2])
    with pytest.raises(ValueError, match="'next'"):
        lens(model, ids, target="last")


def test_what_cannot_be_read_is_refused():
    with pytest.raises(UnsupportedModelError, match="with its head"):
        lens(tiny.llama().model, tiny.ids(6))
    with pytest.raises(ValueError, match="fit_lens"):
        lens(tiny.llama(), tiny.ids(6), kind="tuned")
    with pytest.raises(ValueError, match="top=0"):
        lens(tiny.llama(), tiny.ids(6), top=0)


def test_it_is_shown_as_text_and_as_a_frame():
    pandas = pytest.importorskip("pandas")
    words = tiny.Words()
    found = lens(tiny.llama(), "abc,def.", tokenizer=words)
    text = found.table()
    assert text.splitlines()[0].split() == ["reads", *"abc,def."]
    assert "layer 1" in text
    assert "KL" in repr(found)
    frame = found.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 3 * 8
    assert frame["loss"].iloc[0] == found.loss[0, 0]
    with pytest.raises(LookupError, match="no example 4"):
        found.table(example=4)


def test_the_model_stays_as_it_was_also_after_an_error():
    model = tiny.llama().train()
    read = Readout(view(model), {"input_ids": tiny.ids(6)})
    with pytest.raises(RuntimeError):
        read(torch.zeros(1, 6, 7))
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())
    lens(model, tiny.ids(6))
    assert model.training


def test_answers_that_are_all_alike_are_not_all_right():
    """Where every token is as likely, one is named, and it is right by chance only."""
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = tiny.ids(12, batch=4)
    found = lens(model, ids).by_layer()
    named = lens(model, ids).top[0, :, 0]
    assert len(set(named.tolist())) == 1
    assert found["accuracy"][0] == np.mean(ids[:, 1:].numpy() == named[0])
