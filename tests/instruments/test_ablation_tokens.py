"""Positions taken out, against passes with a mask, or a changed residual, by hand."""

import numpy as np
import pytest
import torch

from headwise.instruments.token_ablation import ablate_tokens
from tests.instruments import slow_ablation as slow
from tests.instruments import tiny

CLOSE = 2e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_hidden_position_is_one_that_the_mask_leaves_out(name):
    model = getattr(tiny, name)()
    ids = tiny.ids(6, batch=2)
    found = ablate_tokens(model, ids, copies=4)
    before = slow.loss(slow.answer(model, {"input_ids": ids}), ids)
    for place in range(1, 6):  # at 0, a row of a causal model that sees nothing is the model's own
        mask = torch.ones_like(ids)
        mask[:, place] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        given["position_ids"] = torch.arange(6).expand(2, -1)
        wanted = slow.loss(slow.answer(model, given), ids) - before
        assert np.abs(found.effects[:, place] - wanted.numpy()).max() < CLOSE
    assert np.array_equal(found.ids, ids.numpy())


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_residual_of_nothing_or_of_the_mean(how, layer):
    model = tiny.gpt2()
    ids = tiny.ids(5, batch=3)
    block = model.transformer.h[layer]
    found = ablate_tokens(model, ids, how=how, layer=layer)
    before = slow.loss(slow.answer(model, {"input_ids": ids}), ids)
    kept = []
    handle = block.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    slow.answer(model, {"input_ids": ids})
    handle.remove()
    mean = kept[0].mean((0, 1)) if how == "mean" else torch.zeros(32)
    for place in range(5):

        def write(m, args, place=place):
            stream = args[0].clone()
            stream[:, place] = mean
            return (stream, *args[1:])

        handle = block.register_forward_pre_hook(write)
        wanted = slow.loss(slow.answer(model, {"input_ids": ids}), ids) - before
        handle.remove()
        assert np.abs(found.effects[:, place] - wanted.numpy()).max() < CLOSE


def test_the_last_residual_is_only_that_position_s_own_prediction():
    ids = tiny.ids(5, batch=2)
    found = ablate_tokens(tiny.gpt2(), ids, how="zero", layer=2)
    assert np.abs(found.effects[:, :4]).max() > 1e-3
    assert np.abs(found.effects[:, 4]).max() < CLOSE  # the last one predicts nothing that counts


def test_padding_and_shorter_examples_have_no_effect_to_tell():
    ids = tiny.ids(6, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    found = ablate_tokens(tiny.llama(), {"input_ids": ids, "attention_mask": mask}, how="zero")
    assert np.isnan(found.effects[1, 4:]).all()
    assert not np.isnan(found.effects[0]).any()
    assert not np.isnan(found.mean).any()
    assert len(found.top(1)) == 4
    two = ablate_tokens(tiny.llama(), [tiny.ids(6), tiny.ids(4)], how="zero")
    assert two.effects.shape == (2, 6)
    assert np.isnan(two.effects[1, 4:]).all()
    assert (two.ids[1, 4:] == -1).all()


def test_positions_of_an_encoder():
    model = tiny.bart()
    inputs = {"input_ids": tiny.ids(5), "decoder_input_ids": tiny.ids(4, seed=1)}
    found = ablate_tokens(model, inputs)
    before = slow.loss(slow.answer(model, inputs), inputs["decoder_input_ids"])
    for place in range(5):
        mask = torch.ones(1, 5, dtype=torch.long)
        mask[:, place] = 0
        given = inputs | {"attention_mask": mask}
        wanted = slow.loss(slow.answer(model, given), inputs["decoder_input_ids"]) - before
        assert found.effects[0, place] == pytest.approx(wanted.item(), abs=CLOSE)
    assert ablate_tokens(model, inputs, stack="decoder", how="zero").effects.shape == (1, 4)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"how": "uniform"}, "expected one of hide, zero, mean"),
        ({"stack": "vision"}, "the model has decoder"),
        ({"copies": 0}, "expected 1 or more"),
        ({"how": "zero", "layer": 9}, "has layers 0 to 1"),
    ],
)
def test_what_cannot_be_asked_is_said(asked, said):
    with pytest.raises(ValueError, match=said):
        ablate_tokens(tiny.llama(), tiny.ids(4), **asked)
