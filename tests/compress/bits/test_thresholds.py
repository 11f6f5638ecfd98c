"""Skipped neurons: the same numbers as with zeros in their places, and none of their weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.compress.bits.thresholded import Thresholded
from headwise.compress.bits.thresholds import ThresholdActivations, threshold_activations
from headwise.compress.step import read_step, steps_of, write_step
from headwise.models import Site, recording, view
from headwise.models.backbones import Decoder
from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import features_first
from headwise.parts import Attention
from headwise.parts.feed.gated import Gated
from tests.instruments import tiny


def own() -> nn.Module:
    torch.manual_seed(0)
    return Decoder(
        tiny.VOCABULARY,
        32,
        2,
        lambda layer: Attention(32, 4, causal=True),
        feed=lambda layer: Gated(32, bias=True),
    ).eval()


MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "own": own}


def given() -> dict[str, Tensor]:
    return {"input_ids": tiny.ids(40, batch=3)}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_without_sparsity(name: str) -> None:
    model = MODELS[name]()
    ids = given()["input_ids"]
    want = logits(model, ids)
    threshold_activations(model, given(), sparsity=0.0)
    torch.testing.assert_close(logits(model, ids), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, ids[:1, :1]), want[:1, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", ["channel", "tensor"])
def test_the_share_that_is_skipped(name: str, by: str) -> None:
    model = MODELS[name]()
    plain = copy.deepcopy(model)
    threshold_activations(model, given(), sparsity=0.6, by=by)
    found = [m for m in model.modules() if isinstance(m, Thresholded)]
    assert len(found) == 2
    # in the first layer the tokens of calibration come in as they did
    look = view(plain)
    with recording(look, [Site("neurons", 0)]) as kept:
        logits(plain, given()["input_ids"])
    first = found[0]
    neurons = kept[Site("neurons", 0)]
    if first.up is None:
        share = (neurons.abs() <= first.thresholds).float().mean()
        assert float(share) == pytest.approx(0.6, abs=0.005)
        if by == "tensor":
            assert first.thresholds.unique().numel() == 1
    with recording(view(model), [Site("neurons", 0)]) as kept:
        logits(model, given()["input_ids"])
    zeros = (kept[Site("neurons", 0)] == 0).float().mean()
    assert float(zeros) == pytest.approx(0.6, abs=0.005)


def test_thresholds_against_a_loop() -> None:
    model, plain = tiny.llama(), tiny.llama()
    threshold_activations(model, given(), sparsity=0.7)
    with recording(view(plain), [Site("mlp", 1)]):
        seen: list[Tensor] = []
        hook = plain.model.layers[1].mlp.register_forward_pre_hook(
            lambda m, args: seen.append(args[0])
        )
        logits(plain, given()["input_ids"])
        hook.remove()
    mlp = plain.model.layers[1].mlp
    x = seen[0].flatten(0, 1)
    with torch.no_grad():
        up = mlp.up_proj(x).abs().double().mean(0)
        gate = F.silu(mlp.gate_proj(x)).abs().double()
    every = sorted(float(gate[t, i] * up[i]) for t in range(len(x)) for i in range(len(up)))
    quantile = every[round(0.7 * len(every)) - 1]
    made = model.model.layers[1].mlp.thresholds.double()
    torch.testing.assert_close(made, quantile / up, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tile", [1, 100, 1 << 17])
def test_one_token_skips_what_many_set_to_zero(
    name: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.compress.bits.thresholded._TILE", tile)
    model = MODELS[name]()
    threshold_activations(model, given(), sparsity=0.5)
    for one in [m for m in model.modules() if isinstance(m, Thresholded)]:
        x = torch.randn(1, 6, 32)
        with torch.no_grad():
            want = one(x)
            got = torch.cat([one(x[:, t : t + 1]) for t in range(6)], 1)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            gate = one.activation(one.gate(x[:, -1:]))
        assert one.kept == int((gate.abs() > one.thresholds).sum())
        # weights of skipped neurons are not read: not a number there changes nothing
        off = (gate.abs() <= one.thresholds).flatten()
        with torch.no_grad():
            one.down.weight[off] = torch.nan
            if one.up is not None:
                features_first(one.up)[off] = torch.nan
            torch.testing.assert_close(one(x[:, -1:]), want[:, -1:], atol=1e-5, rtol=1e-5)


def test_generation_is_that_of_the_dense_path() -> None:
    model = tiny.llama()
    threshold_activations(model, given(), sparsity=0.5)
    ids = tiny.ids(7)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    fast = model.generate(ids, **options)
    for one in model.modules():
        if isinstance(one, Thresholded):
            one.training = True  # takes the dense path
    assert torch.equal(model.generate(ids, **options), fast)


def test_channels_beat_the_tensor_where_ups_differ() -> None:
    errors = {}
    for by in ("channel", "tensor"):
        model = tiny.llama()
        with torch.no_grad():
            for layer in model.model.layers:
                spread = torch.randn(48, generator=torch.Generator().manual_seed(5)).exp()
                layer.mlp.up_proj.weight.mul_(spread[:, None])
        ids = given()["input_ids"]
        want = logits(model, ids)
        threshold_activations(model, given(), 0.6, by, layers=[1])
        errors[by] = float((logits(model, ids) - want).norm())
    assert errors["channel"] < 0.8 * errors["tensor"]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_done_again(name: str) -> None:
    model = MODELS[name]()
    threshold_activations(model, given(), 0.5, layers=[1])
    (step,) = steps_of(model)
    again = read_step(write_step(step))
    assert isinstance(again, ThresholdActivations)
    other = MODELS[name]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    again.apply(other)
    other.load_state_dict(model.state_dict(), strict=True)
    ids = given()["input_ids"]
    assert torch.equal(logits(other, ids), logits(model, ids))
    again.apply(MODELS[name]().to("meta"))


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_a_model_with_thresholds_can_be_copied(make: Any) -> None:
    model = make()
    threshold_activations(model, {"input_ids": tiny.ids(16)}, sparsity=0.5)
    with torch.no_grad():
        mine, theirs = (m(tiny.ids(9)).logits for m in (model, copy.deepcopy(model)))
    assert torch.equal(mine, theirs)
    assert not any(b.requires_grad for b in model.buffers())


def test_what_cannot_be_is_refused() -> None:
    model = tiny.llama()
    for sparsity, by, layers, message in [
        (1.0, "channel", None, "sparsity"),
        (0.5, "row", None, "by="),
        (0.5, "channel", [9], "layers="),
        (0.5, "channel", [], "layers="),
    ]:
        with pytest.raises(ValueError, match=message):
            threshold_activations(model, given(), sparsity, by, layers)
    with pytest.raises(UnsupportedModelError, match="two or three linear maps"):
        threshold_activations(tiny.gpt_oss(), given())
    assert steps_of(model) == ()
