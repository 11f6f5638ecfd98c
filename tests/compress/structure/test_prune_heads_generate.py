"""Smaller models generate what the whole one generates with the same heads silenced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from headwise.compress import drop_layers, prune_heads
from headwise.edits import Silence, swap
from headwise.models import UnsupportedModelError, view
from tests.models.families import DECODERS, FAMILIES, inputs

GENERATES = [n for n in DECODERS if n != "olmo2"] + ["bart", "marian", "whisper"]
"""T5 with more layers in its decoder than in its encoder does not generate in transformers."""


def _rows(model: Any, unequal: bool) -> list[tuple[str, str, int, int]]:
    """Layer 0 loses everything, layer 1 all groups some, later layers less."""
    rows = []
    for a in view(model).attentions:
        if a.kind == "cross" or a.stack == "encoder":
            gone = [1]
        elif a.layer == 0:
            gone = list(range(a.heads))
        else:
            gone = [1, 2, 3] if unequal else list(range(0, a.heads, 2))
        rows += [(a.stack, a.kind, a.layer, h) for h in gone]
    return rows


def _generate(model: Any, batch: dict[str, Any], **more: Any) -> Any:
    return model.generate(
        **batch,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("name", GENERATES)
def test_token_for_token(name: str, unequal: bool) -> None:
    """With a cache, behind left padding, where the first layer has no attention at all: whole
    caches are asked for their length through it."""
    model = FAMILIES[name]("eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    encoding = model.config.is_encoder_decoder
    batch = inputs(model, padding=None if encoding else "left")
    batch.pop("decoder_input_ids", None)
    rows = _rows(model, unequal and not encoding)
    with swap(model, {row: Silence() for row in rows}):
        expected = _generate(model, batch)
    prune_heads(model, rows)
    found = _generate(model, batch)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    alone = _generate(model, batch, use_cache=False)
    assert torch.equal(alone.sequences, expected.sequences)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_beams_are_reordered(implementation: str) -> None:
    model = FAMILIES["llama"](implementation)
    batch = inputs(model, padding="left")
    rows = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (2, 0)]
    with swap(model, {row: Silence() for row in rows}):
        expected = _generate(model, batch, num_beams=3)
    prune_heads(model, rows)
    assert torch.equal(_generate(model, batch, num_beams=3).sequences, expected.sequences)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_the_cache_holds_no_more_than_what_is_left(implementation: str) -> None:
    model = FAMILIES["llama"]("sdpa")
    prune_heads(model, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 0)])
    batch = inputs(model)
    if implementation == "static":
        found = _generate(model, batch, cache_implementation="static")
        assert torch.equal(found.sequences, _generate(model, batch).sequences)
        return
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    # a layer without attention leaves one zero, unequal groups what is stored
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [
        (2, 1, 11, 1),
        (2, 1, 11, 6),
        (2, 2, 11, 6),
    ]


def test_training_and_decoding_step_by_step_agree() -> None:
    model = FAMILIES["qwen3"]("sdpa")
    prune_heads(model, [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 3)])
    ids = inputs(model)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        steps = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
            for i in range(ids.shape[1])
        ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-4)


def test_a_cache_that_gives_no_tensors_is_refused_by_unequal_groups() -> None:
    class Odd(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            return object(), object()

    model = FAMILIES["llama"]("sdpa")
    prune_heads(model, [(1, 0)])
    with pytest.raises(UnsupportedModelError, match="unequal groups"), torch.no_grad():
        model.model.layers[1](
            torch.zeros(1, 2, 40),
            position_embeddings=(torch.ones(1, 2, 6), torch.zeros(1, 2, 6)),
            past_key_values=Odd(),
        )


@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2_window", "gpt_oss"])
def test_sliding_layers_stay_themselves_when_others_go(name: str) -> None:
    """Longer than the window: a layer with the wrong mask or cache would show."""
    model = FAMILIES[name]("eager")
    drop_layers(model, [0])
    batch = inputs(model)
    found = _generate(model, batch)
    alone = _generate(model, batch, use_cache=False)
    assert torch.equal(found.sequences, alone.sequences)
    kinds = getattr(model.config, "layer_types", None)
    assert kinds is None or len(kinds) == 2
