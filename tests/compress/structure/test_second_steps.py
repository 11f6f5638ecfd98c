"""What is done to a model that has been changed already: done right, or refused before anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from headwise.compress import (
    compensate,
    drop_layers,
    factorise,
    fuse_layer,
    prune_channels,
    prune_heads,
    quantise,
    steps_of,
    threshold_activations,
)
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.parts import Attention
from headwise.parts.feed.mlp import Mlp
from tests.instruments import tiny

INPUTS = {"input_ids": tiny.ids(20, batch=3)}


def ours() -> nn.Module:
    torch.manual_seed(0)
    return Decoder(60, 24, 2, lambda n: Attention(24, 4, causal=True), lambda n: Mlp(24))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "bert": tiny.bert,
    "ours": ours,
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(**INPUTS)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_few_bits_come_last_and_say_so(name: str, bits: int) -> None:
    model = MODELS[name]()
    quantise(model, bits)
    before, steps = logits(model), steps_of(model)
    for change in (
        lambda: prune_heads(model, [(0, 1)]),
        lambda: prune_channels(model, {0: [1, 2]}),
    ):
        with pytest.raises(UnsupportedModelError, match="QuantisedLinear cannot be cut"):
            change()
    if name != "ours":
        with pytest.raises(UnsupportedModelError, match="no matrix of floats"):
            fuse_layer(model, INPUTS, 1, group=1, rank=1, steps=1)
    assert torch.equal(logits(model), before)
    assert steps_of(model) == steps


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_feed_forward_part_of_few_bits_is_still_seen(name: str) -> None:
    model = MODELS[name]()
    before = [layer.mlp for layer in view(model).layers]
    quantise(model, 8)
    assert [layer.mlp for layer in view(model).layers] == before
    drop_layers(model, [0], parts="mlp")
    found = compensate(model, MODELS[name](), INPUTS)
    assert logits(model).isfinite().all()
    assert not found.fits
    assert "layer 1 mlp" in found.skipped


@pytest.mark.parametrize("name", ["llama", "gpt2", "ours"])
def test_channels_go_with_their_thresholds(name: str) -> None:
    model = MODELS[name]()
    threshold_activations(model, INPUTS, sparsity=0.4)
    twin = copy.deepcopy(model)
    gone = [0, 5, 7]
    for layer in view(twin).layers:
        with torch.no_grad():
            layer.mlp.thresholds[gone] = torch.inf  # type: ignore[union-attr,operator]
    prune_channels(model, dict.fromkeys(range(2), gone))
    assert torch.allclose(logits(model), logits(twin), atol=1e-5)
    one = {"input_ids": INPUTS["input_ids"][:1, :1]}
    with torch.no_grad():  # a single token takes the path that skips
        alone, other = (m(**one) for m in (model, twin))
    assert torch.allclose(
        getattr(alone, "logits", alone), getattr(other, "logits", other), atol=1e-5
    )


def test_heads_and_channels_of_thin_matrices_go() -> None:
    model = tiny.llama()
    factorise(model, rank=4, weighting="none")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.model.layers:
            layer.mlp.down_proj.down.weight[:, 3] = 0
        twin.model.layers[0].self_attn.o_proj.down.weight[:, :16] = 0
    prune_channels(model, {0: [3], 1: [3]})
    prune_heads(model, [(0, 0), (0, 1)])
    assert torch.allclose(logits(model), logits(twin), atol=1e-5)
