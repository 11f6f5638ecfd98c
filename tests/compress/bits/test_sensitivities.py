"""Measured effects of few bits against models that are rounded by hand and run as a whole."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from headwise.compress.bits.rounding import rounded
from headwise.compress.bits.sensitivities import sensitivity
from headwise.compress.bits.weights import quantise
from headwise.compress.structure.heads import prune_heads
from headwise.compress.structure.low_rank import factorise
from headwise.instruments.metrics import metric_of
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.models.prefix import logits_of
from headwise.models.projections import features_first
from headwise.parts import Attention
from headwise.parts.feed.mlp import Mlp
from tests.instruments import tiny

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}


def loss(model: nn.Module) -> float:
    ids = tiny.ids(20, batch=3)
    with torch.no_grad():
        logits = logits_of(model(input_ids=ids))
        found = metric_of("loss").score(logits, {"input_ids": ids})
    return float(found.double().mean())


def given() -> dict[str, torch.Tensor]:
    return {"input_ids": tiny.ids(20, batch=3)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["layer", "module"])
def test_parts_against_whole_runs(name: str, by: str) -> None:
    model = MODELS[name]()
    found = sensitivity(model, given(), (4, 2), by, group=8, batch_size=2)
    assert found.unchanged == pytest.approx(loss(model), abs=1e-5)
    for row, part in enumerate(found.names):
        for at, bits in enumerate(found.bits):
            twin = copy.deepcopy(model)
            quantise(twin, {part: bits}, group=8)
            want = loss(twin) - loss(model)
            assert found.effects[row, at] == pytest.approx(want, abs=2e-5)
            held = sum(
                m.codes.nbytes + m.scale.nbytes + m.zero.nbytes
                for m in twin.modules()
                if hasattr(m, "codes")
            )
            assert found.bytes[row, at] == held


@pytest.mark.parametrize("name", MODELS)
def test_heads_against_whole_runs(name: str) -> None:
    model = MODELS[name]()
    found = sensitivity(model, given(), (2,), "head")
    assert found.atlas is not None
    row = 0
    for number, attention in enumerate(view(model).attentions):
        for head in range(attention.heads):
            twin = copy.deepcopy(model)
            mine, theirs = attention.projections, view(twin).attentions[number]
            assert not isinstance(mine, str)
            shared = head // (attention.heads // attention.kv_heads)
            few = copy.deepcopy(model)
            changed = view(few).attentions[number]
            with torch.no_grad():
                held = changed.projections
                assert not isinstance(held, str)
                modules = {id(p.module): p.module for p in (held.query, held.key, held.value)}
                for module in (*modules.values(), held.output):
                    table = features_first(module)
                    table.copy_(rounded(table, 2))
                theirs.query_weight()[head] = changed.query_weight()[head]
                theirs.key_weight()[shared] = changed.key_weight()[shared]
                theirs.value_weight()[shared] = changed.value_weight()[shared]
                theirs.output_weight()[head] = changed.output_weight()[head]
            want = loss(twin) - loss(model)
            assert found.effects[row, 0] == pytest.approx(want, abs=2e-5)
            assert found.atlas.heads["effect_2_bits"][row] == found.effects[row, 0]
            row += 1
    with pytest.raises(ValueError, match="by='module'"):
        found.widths(1e9)


def test_heads_of_unequal_groups_round_the_keys_and_values_that_they_read() -> None:
    model = tiny.llama()
    prune_heads(model, [(0, 1)])
    found = sensitivity(model, given(), (2,), "head")
    attention = model.model.layers[0].self_attn
    for head, shared in ((0, 0), (1, 1)):
        twin = copy.deepcopy(model)
        theirs = twin.model.layers[0].self_attn
        with torch.no_grad():
            for name, at in (("q_proj", head), ("k_proj", shared), ("v_proj", shared)):
                few = rounded(getattr(attention, name).weight, 2)
                getattr(theirs, name).weight[8 * at : 8 * at + 8] = few[8 * at : 8 * at + 8]
            few = rounded(attention.o_proj.weight, 2)
            theirs.o_proj.weight[:, 8 * head : 8 * head + 8] = few[:, 8 * head : 8 * head + 8]
        assert found.effects[head, 0] == pytest.approx(loss(twin) - loss(model), abs=2e-5)


def test_heads_of_what_is_no_matrix_are_refused() -> None:
    model = tiny.llama()
    factorise(model, rank=4, weighting="none", which=["model.layers.0.self_attn.v_proj"])
    with pytest.raises(UnsupportedModelError, match="LowRank"):
        sensitivity(model, given(), (2,), "head")


def test_layers_of_our_own_models_are_measured_and_quantised() -> None:
    def feed(layer: int) -> Mlp:
        return Mlp(24)

    torch.manual_seed(0)
    model = Decoder(60, 24, 2, lambda layer: Attention(24, 4, causal=True), feed)
    found = sensitivity(model, given(), (8, 2))
    assert len(found.names) == 2
    bits = found.widths(float(found.bytes[0, 0] + found.bytes[1, 1]))
    assert sorted(bits.values()) == [2] * 6 + [8] * 6
    before = loss(model)
    twin = copy.deepcopy(model)
    quantise(twin, {name: 2 for name in bits if ".0." in name})
    assert loss(twin) - before == pytest.approx(found.effects[0, 1], abs=2e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    for by in ("layer", "module", "head"):
        sensitivity(model, given(), (2,), by)

    def broken(module: nn.Module, args: object) -> None:
        if model.model.layers[1].mlp.up_proj.weight.unique().numel() < 200:
            raise RuntimeError("in the middle")

    model.model.layers[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        sensitivity(model, given(), (1,), "layer")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bits_are_shared_out_by_what_was_measured() -> None:
    model = tiny.llama()
    with torch.no_grad():  # the first layer's MLP hardly counts
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-4)
    found = sensitivity(model, given(), (8, 2), "module", "kl")
    budget = 0.7 * found.bytes[:, 0].sum()
    widths = found.widths(budget)
    rows = np.arange(len(found.names))
    chosen = [found.bits.index(widths[name]) for name in found.names]
    assert found.bytes[rows, chosen].sum() <= budget
    assert all(widths[n] == 2 for n in found.names if ".0.mlp" in n)
    quantise(model, widths)
    with pytest.raises(ValueError, match="reachable"):
        found.widths(10)


def test_what_cannot_be_is_refused() -> None:
    model = tiny.llama()
    for bits, by, group, message in [
        ((9,), "layer", None, "from 1 to 8"),
        ((), "layer", None, "one or several"),
        ((4,), "neuron", None, "by="),
        ((4,), "layer", 5, "does not divide"),
    ]:
        with pytest.raises(ValueError, match=message):
            sensitivity(model, given(), bits, by, group=group)
