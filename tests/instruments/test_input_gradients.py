"""Gradients at the input embeddings: against captum, by hand, and in what they add up to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.instruments.input_gradients import gradient_x_input, integrate, integrated_gradients
from headwise.instruments.input_places import InputPlace
from headwise.instruments.metrics import LogitDifference, metric_of
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.models.prefix import logits_of
from headwise.parts import Attention
from tests.instruments import tiny

STEPS = 12


def images(batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.manual_seed(0))}


def words(n: int = 9, batch: int = 2) -> dict[str, Tensor]:
    return {"input_ids": tiny.ids(n, batch=batch)}


def calm(model: Any) -> Any:
    """The same model with smaller weights, along which few steps integrate well."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= 0.3
    return model


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "bert": (tiny.bert, words, lambda m: m.bert.embeddings.word_embeddings),
    "llama": (tiny.llama, words, lambda m: m.model.embed_tokens),
    "gpt2": (tiny.gpt2, words, lambda m: m.transformer.wte),
    "vit": (tiny.vit, images, lambda m: m.vit.embeddings),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_as_captum(name: str) -> None:
    attr = pytest.importorskip("captum.attr")
    make, given, place = MODELS[name]
    model, inputs = calm(make()), given()
    (key, value), module = next(iter(inputs.items())), place(model)
    pixels = key == "pixel_values"
    metric = LogitDifference(1, 0)

    def call(x: Tensor) -> Tensor:
        return metric.score(logits_of(model(**{key: x})), {key: x})

    multiplied = attr.LayerGradientXActivation(call, module).attribute(value)
    theirs = attr.LayerIntegratedGradients(call, module)
    # captum's layer baseline is what the layer gives for a baseline input
    base = torch.zeros_like(value)
    parts = theirs.attribute(value, base, n_steps=STEPS)
    ours = view(model)
    baseline: Any = InputPlace(ours, {key: base}).read() if pixels else 0
    found = integrate(ours, inputs, metric, steps=STEPS, baseline=baseline, at_once=5)
    torch.testing.assert_close(found.parts, parts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        gradient_x_input(ours, inputs, metric), multiplied.sum(-1), atol=1e-5, rtol=1e-4
    )
    summed = integrated_gradients(ours, inputs, metric, steps=STEPS, baseline=baseline)
    torch.testing.assert_close(summed, parts.sum(-1), atol=1e-5, rtol=1e-4)
    length = integrated_gradients(
        ours, inputs, metric, steps=STEPS, baseline=baseline, features="norm"
    )
    torch.testing.assert_close(length, parts.norm(dim=-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_adds_up_and_leaves_nothing(name: str) -> None:
    make, given, _ = MODELS[name]
    model, inputs = calm(make()).double(), given()
    if "pixel_values" in inputs:
        inputs = {"pixel_values": inputs["pixel_values"].double()}
    model.train()
    before = model.training
    # at an input of zero a norm jumps: few steps do not see that
    base: Any = 5 if "input_ids" in inputs else torch.linspace(-1, 1, 32)
    found = integrate(view(model), inputs, LogitDifference(1, 0), steps=24, baseline=base)
    coarse = integrate(view(model), inputs, LogitDifference(1, 0), steps=2, baseline=base)
    difference = (found.score - found.baseline_score).abs()
    assert bool((found.gap.abs() <= 0.02 * difference + 1e-3).all())
    assert found.gap.abs().sum() < coarse.gap.abs().sum()
    assert model.training is before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_by_hand_in_a_linear_model() -> None:
    """No nonlinearity but the sum: gradient x input and IG are the terms of the sum."""

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(7, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embed(input_ids).sum(1)

    torch.manual_seed(0)
    model = Sum()
    look = view(Decoder(7, 4, 1, mixer=lambda layer: Attention(4, 1, causal=True)))
    from dataclasses import replace

    look = replace(look, model=model, owners={})
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    terms = model.embed.weight[ids]
    metric = LogitDifference(0, 1)
    expected = (terms[..., 0] - terms[..., 1]).detach()
    torch.testing.assert_close(gradient_x_input(look, {"input_ids": ids}, metric), expected)
    for rule in ("gauss", "middle"):
        found = integrated_gradients(look, {"input_ids": ids}, metric, steps=3, rule=rule)
        torch.testing.assert_close(found, expected)


def test_baselines_and_sides() -> None:
    model = calm(tiny.bart())
    inputs = {"input_ids": tiny.ids(6, batch=2), "decoder_input_ids": tiny.ids(4, 5, batch=2)}
    look, metric = view(model), LogitDifference(3, 4)
    for of, n in (("encoder", 6), ("decoder", 4)):
        for baseline in ("zero", "pad", 7):
            found = integrate(look, inputs, metric, steps=16, of=of, baseline=baseline)
            assert found.parts.shape == (2, n, 32)
            difference = (found.score - found.baseline_score).abs()
            assert bool((found.gap.abs() <= 0.05 * difference + 1e-2).all())
    there = integrate(look, inputs, metric, steps=3, baseline=7)
    other = {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 7)}
    with torch.no_grad():
        expected = metric.score(model(**other).logits, other)
    torch.testing.assert_close(there.baseline_score, expected, atol=1e-4, rtol=1e-4)
    residual = integrate(look, inputs, metric, steps=3, at="residual", baseline=torch.zeros(32))
    assert residual.parts.shape == (2, 6, 32)


def test_our_own_decoder() -> None:
    torch.manual_seed(0)
    model = Decoder(20, 16, 2, mixer=lambda layer: Attention(16, 2, causal=True))
    ids = torch.randint(20, (2, 6))
    x = model.embed(ids).detach().requires_grad_(True)
    logits = model.answer(model.stack(x))
    (logits[:, -1, 3] - logits[:, -1, 1]).sum().backward()
    found = gradient_x_input(view(model), {"input_ids": ids}, LogitDifference(3, 1))
    assert x.grad is not None
    torch.testing.assert_close(found, (x * x.grad).sum(-1).detach())


def test_refusals() -> None:
    look, inputs, metric = view(tiny.gpt2()), words(), LogitDifference(1, 0)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"at": "logits"}, "at='logits'"),
        ({"of": "encoder"}, "of='encoder': the model has decoder"),
        ({"steps": 0}, "steps=0"),
        ({"rule": "simpson"}, "rule='simpson'"),
        ({"features": "mean"}, "features='mean'"),
        ({"baseline": "pad"}, "names no padding token"),
        ({"baseline": torch.zeros(5)}, "does not broadcast"),
        ({"baseline": "noise"}, "baseline='noise'"),
    ]
    for options, words_ in cases:
        with pytest.raises(ValueError, match=words_):
            integrated_gradients(look, inputs, metric, **options)
    with pytest.raises(ValueError, match="'accuracy' has no gradient"):
        gradient_x_input(look, inputs, metric_of("accuracy"))
    with pytest.raises(ValueError, match="at='tokens' needs input_ids"):
        gradient_x_input(view(tiny.vit()), images(), metric, at="tokens")
