"""Small random models of every kind that a cache has to be right for, and a slow twin of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from headwise.compress import Policy, Seen
from tests.instruments import tiny
from tests.instruments.tiny import SIZE


def gemma3(window: int = 9) -> Any:
    """Every second layer slides."""
    config = Gemma3TextConfig(
        **{**SIZE, "num_hidden_layers": 4},
        head_dim=8,
        num_key_value_heads=2,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return tiny._sharp(Gemma3ForCausalLM(config))


def gemma2() -> Any:
    """Soft-capped scores, by eager code."""
    config = Gemma2Config(
        **SIZE, head_dim=8, num_key_value_heads=2, sliding_window=9, attn_logit_softcapping=5.0
    )
    return tiny._sharp(Gemma2ForCausalLM(config))


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "llama eager": lambda: eager(tiny.llama()),
    "gpt2": tiny.gpt2,
    "mistral": tiny.mistral,
    "gpt_oss": tiny.gpt_oss,
    "gemma2": gemma2,
    "gemma3": gemma3,
}

MODELS: dict[str, Callable[[], Any]] = {name: cache(make) for name, make in MAKERS.items()}
"""Each made once."""


@torch.no_grad()
def logits(model: Any, held: Any, ids: Tensor, sizes: list[int], **more: Any) -> Tensor:
    """`(batch, n, vocabulary)` of a text read in steps of these sizes."""
    outs, start = [], 0
    for size in sizes:
        given = dict(more)
        if "attention_mask" in more:
            given["attention_mask"] = more["attention_mask"][:, : start + size]
        if "position_ids" in more:
            given["position_ids"] = more["position_ids"][:, start : start + size]
        step = ids[:, start : start + size]
        outs.append(model(step, past_key_values=held, use_cache=True, **given).logits)
        start += size
    return torch.cat(outs, 1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in float64, entry by entry: q `(g, m, d)`, k `(n, d)`, v `(n, d_v)`, seen
    `(m, n)` True where a query looks, sinks `(g,)`. A query that sees nothing gives zeros."""
    g, m, _ = q.shape
    out = torch.zeros(g, m, v.shape[-1], dtype=torch.float64)
    for head in range(g):
        for i in range(m):
            scores = (k.double() @ q[head, i].double()) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen[i], -math.inf)
            extra = scores.new_tensor([-math.inf if sinks is None else float(sinks[head])])
            if bool(seen[i].any()):
                out[head, i] = torch.cat([scores, extra]).softmax(0)[:-1] @ v.double()
    return out


class Direction(Policy):
    """Scores that are never equal, also of tokens that are: rotation is in the keys."""

    def score(self, seen: Seen) -> Tensor:
        return seen.keys @ torch.linspace(-1, 1, seen.keys.shape[-1])


SMALL: dict[str, Any] = {"sinks": 2, "window": 4, "step": 4, "slack": 4}


def padded(lengths: list[int], left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Texts `(batch, n)` with padding, their mask, and their position numbers."""
    n = max(lengths)
    text, mask = tiny.ids(n, seed=3, batch=len(lengths)), torch.zeros(len(lengths), n).long()
    for row, length in enumerate(lengths):
        mask[row, n - length if left else 0 : n if left else length] = 1
    return text.masked_fill(mask == 0, 0), mask, (mask.cumsum(1) - 1).clamp_min(0)


GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
