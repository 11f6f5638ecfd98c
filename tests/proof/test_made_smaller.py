"""Real weights made smaller: equal to the ablated model, saved and loaded, and plain where even.

Weights: stories260K (MIT), a ViT on MNIST (MIT), the model that headwise brings along, and
SmolLM2-135M-Instruct (Apache-2.0; see test_smollm2), whose groups have three query heads.
"""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import headwise
from headwise.compress import cost, drop_layers, prune_channels, prune_heads
from headwise.edits import Silence, swap
from headwise.models import Site, touching, view
from headwise.models.default import default_model_path
from tests.proof.mnist_vit import as_vit
from tests.proof.weights import PROSE, loader, stories


def half_of_the_heads(model: Any) -> list[tuple[int, int]]:
    """Any half, so that layers and groups differ; one layer loses all."""
    chance = random.Random(0)
    every = [(a.layer, h) for a in view(model).attentions for h in range(a.heads)]
    return sorted({*chance.sample(every, len(every) // 2), *[row for row in every if row[0] == 2]})


@torch.no_grad()
def check(model: Any, batch: dict[str, torch.Tensor], place: Path) -> None:
    rows = half_of_the_heads(model)
    look = view(model)
    channels = {
        layer.index: list(range(layer.index % 3, _channels(layer), 2)) for layer in look.layers
    }

    def without(gone: list[int]) -> Any:
        return lambda there: there.index_fill(-1, torch.tensor(gone), 0.0)

    writes = {Site("neurons", at): without(gone) for at, gone in channels.items()}
    with swap(model, {row: Silence() for row in rows}), touching(look, writes):
        expected = model(**batch).logits
    before = cost(model)
    prune_heads(model, rows)
    prune_channels(model, channels)
    found = model(**batch).logits
    close = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=close, rtol=1e-4)
    after = cost(model)
    assert after.parameters < before.parameters
    assert after.cache_bytes_per_token <= before.cache_bytes_per_token
    headwise.save(model, place)
    assert torch.equal(headwise.load(place)(**batch).logits, found)


def _channels(layer: Any) -> int:
    from headwise.compress.structure.feeds import feed_forward

    return feed_forward(layer).channels


def generated(model: Any, ids: torch.Tensor) -> list[int]:
    out = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    return out[0].tolist()


def test_stories260k(assets: Path, tmp_path: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()
    ids = stories(assets)[0][:, :96]
    rows = half_of_the_heads(model)
    with swap(model, {row: Silence() for row in rows}):
        expected = generated(model, ids[:, :20])
    check(model, {"input_ids": ids}, tmp_path / "it")
    whole: Any = LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()
    prune_heads(whole, rows)
    assert generated(whole, ids[:, :20]) == expected


def test_the_vit_of_mnist(assets: Path, tmp_path: Path) -> None:
    weights = torch.load(
        assets / "vit_mnist" / "vit_mnist_gpu.pt", map_location="cpu", weights_only=True
    )
    model = as_vit(weights, attn_implementation="sdpa")
    images = loader(assets / "vit_mnist" / "vit_mnist.py").mnist_test()[0][:32]
    check(model, {"pixel_values": images}, tmp_path / "it")


def test_the_model_that_comes_along(tmp_path: Path) -> None:
    path = default_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = AutoTokenizer.from_pretrained(path)(PROSE[:300], return_tensors="pt").input_ids
    check(model, {"input_ids": ids}, tmp_path / "it")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'headwise[gguf]'")
    pytest.importorskip("accelerate", reason="accelerate is not installed: see headwise[gguf]")
    default = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m"
    place = Path(os.environ.get("HEADWISE_SMOLLM2", default))
    found = sorted(place.glob("*.gguf")) if place.is_dir() else [place]
    if not found or not found[0].is_file():
        pytest.skip(f"no weights at {place}: make smollm2, or set HEADWISE_SMOLLM2")
    file = found[0]
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_smollm2(smollm2: Any, tmp_path: Path) -> None:
    """Nine query heads on three key-value heads: unequal groups everywhere, then even ones that
    transformers loads alone."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    ids = tokenizer(PROSE[:400], return_tensors="pt").input_ids
    check(model, {"input_ids": ids}, tmp_path / "it")


def test_smollm2_even(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(PROSE[:200], return_tensors="pt").input_ids
    groups = [(a.layer, 3 * (a.layer % 3) + h) for a in view(model).attentions for h in range(3)]
    prune_heads(model, groups)
    drop_layers(model, [11, 12, 13])
    with torch.no_grad():
        expected = model(ids).logits
        headwise.save(model, tmp_path / "it", tokenizer=tokenizer)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "it").eval()
        assert plain.config.num_attention_heads == 6
        assert torch.equal(plain(ids).logits, expected)
