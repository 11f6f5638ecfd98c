"""What is counted in closed form is what torch's counter counts, and what files and caches hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from headwise.compress import (
    cost,
    drop_layers,
    factorise,
    prune_channels,
    prune_heads,
    threshold_activations,
)
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.parts import Attention, GroupedQuery
from headwise.parts.feed.mlp import Mlp
from tests.instruments import tiny
from tests.models.families import DECODERS, FAMILIES, LENGTH, inputs

UNCOUNTED = {
    "gpt_oss": "the counter does not know grouped products",
    "moonshine": "its encoder reads samples, not tokens",
    "clip": "its two towers meet in a product of images and texts",
}


def _counted(model: Any, batch: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    return int(counter.get_total_flops())


def _batch(model: Any) -> dict[str, Any]:
    batch = inputs(model)
    if "decoder_input_ids" in batch:
        batch["decoder_input_ids"] = torch.full((2, LENGTH), 5)
    return batch


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in UNCOUNTED])
def test_flops_are_those_of_the_counter(name: str) -> None:
    model = FAMILIES[name]("eager")  # the counter does not know the fused kernel of the CPU
    assert cost(model, LENGTH, 2).flops == _counted(model, _batch(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "vit"])
def test_so_they_are_of_a_smaller_model(name: str) -> None:
    model = FAMILIES[name]("eager")
    stack = "decoder" if len(view(model).stacks) > 1 else None
    before = cost(model, LENGTH, 2)
    prune_heads(model, [(0, h) for h in range(4)] + [(1, 0)], stack=stack)
    prune_channels(model, {0: range(20), 1: range(48)}, stack=stack)
    drop_layers(model, [2], stack=stack)
    after = cost(model, LENGTH, 2)
    assert after.flops == _counted(model, _batch(model)) < before.flops
    assert after.parameters == sum(p.numel() for p in model.parameters()) < before.parameters


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart"])
def test_thin_matrices_count_as_what_they_are(name: str) -> None:
    model = FAMILIES[name]("eager")
    before = cost(model, LENGTH, 2).flops
    factorise(model, rank=3, weighting="none")
    after = cost(model, LENGTH, 2).flops
    assert after == _counted(model, _batch(model)) < before


def test_thin_matrices_and_thresholds_count_in_our_own_models_too() -> None:
    model = Decoder(30, 24, 2, lambda layer: Attention(24, 4, causal=True), lambda layer: Mlp(24))
    before = cost(model, 9).flops
    threshold_activations(model, {"input_ids": tiny.ids(9) % 30}, layers=[0])
    assert cost(model, 9).flops == before  # counted as if nothing were skipped
    factorise(model, rank=3, weighting="none", which="attention")
    saved = 2 * 24 * 24 - 2 * 3 * (24 + 24)
    assert cost(model, 9).flops == before - 9 * 2 * 4 * saved


def test_experts_count_as_far_as_they_run() -> None:
    """By hand: one of two experts for each token, and the router."""
    whole = cost(FAMILIES["gpt_oss"](), LENGTH).flops
    experts = LENGTH * 3 * 2 * (40 * 96 + 48 * 40 + 40 * 2)
    assert whole - experts == cost(FAMILIES["llama"](), LENGTH).flops - LENGTH * 3 * 2 * 3 * 40 * 48


def test_the_images_of_clip_count_by_their_patches() -> None:
    model = FAMILIES["clip"]()
    counted = _counted(model, _batch(model))
    assert counted - cost(model, LENGTH, 2).flops == 2 * 2 * 2 * 24  # every text with every image


def test_our_own_models_count_for_themselves() -> None:
    def mixer(layer: int) -> Attention:
        return Attention(24, 4, project=GroupedQuery(2), causal=True)

    model = Decoder(30, 24, 2, mixer=mixer)
    found = cost(model, 9)
    by_hand = 2 * 9 * 24 * (24 + 12 + 12 + 24) + 2 * 2 * 9 * 9 * 24 + 2 * 2 * 9 * 24 * 96
    attention: Any = model.stack.mixers[0]
    by_parts = attention.flops(9) + 2 * 2 * 9 * 24 * 96
    assert found.flops == 2 * by_parts + 2 * 9 * 24 * 30
    assert by_parts <= by_hand  # our attention counts what a causal mask leaves
    assert found.cache_bytes_per_token == 2 * 2 * 2 * 6 * 4


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in ("mistral",)])
def test_cache_bytes_are_those_of_a_cache(name: str) -> None:
    model = FAMILIES[name]("eager")
    if name != "olmo2":
        prune_heads(model, [(0, h) for h in range(4)] + [(1, 1), (2, 0), (2, 1)])
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.full((1, 3), 5), past_key_values=cache)
    held = sum(t.numel() * t.element_size() for one in cache.layers for t in (one.keys, one.values))
    assert cost(model).cache_bytes_per_token == held / 3


def test_bytes_are_those_of_a_file(tmp_path: Any) -> None:
    from headwise.compress import save

    model = tiny.llama(tie_word_embeddings=True)
    factorise(model, {"input_ids": tiny.ids(16)}, rank=4)
    found = cost(model)
    save(model, tmp_path / "it")
    (file,) = (f for f in (tmp_path / "it").glob("*.safetensors") if "buffers" not in f.name)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert found.bytes == file.stat().st_size - 8 - header
    assert found.bytes == 4 * found.parameters


def test_it_needs_no_numbers() -> None:
    with torch.device("meta"):
        model = tiny.LlamaForCausalLM(tiny.LlamaConfig(**tiny.SIZE, num_key_value_heads=2))
    assert cost(model, 64).flops == cost(tiny.llama(), 64).flops


def test_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        cost(tiny.llama(), tokens=0)
