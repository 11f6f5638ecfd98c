"""A text read with a cache in force, and what a cache that keeps everything would hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.structure.costs import cost

PIECE = 16
"""Tokens that are read at a time after the prompt."""


def read_with_cache(model: nn.Module, ids: Tensor, cache: Any, piece: int = PIECE) -> Tensor:
    """Logits `(batch, n - n // 2, vocabulary)` of the second half of `ids` `(batch, n)`, read in
    pieces with the cache in force; the first half is the prompt."""
    half = ids.shape[1] // 2
    found = [model(input_ids=ids[:, :half], past_key_values=cache, use_cache=True).logits[:, :0]]
    for start in range(half, ids.shape[1], piece):
        part = ids[:, start : start + piece]
        found.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


def full_bytes(model: nn.Module, ids: Tensor) -> int:
    """Of a cache that keeps everything of `ids` as the model computes it."""
    return ids.numel() * cost(model, ids.shape[-1]).cache_bytes_per_token
