"""Additions to scores that are products of something of the query and something of the key.

One more coordinate of both carries them through any kernel, where a tensor `(batch, heads, n_q,
n_k)`, or one that differs by sequence, would cost the fused ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headwise.edits.change import Call


def scaled(call: Call, keys: Tensor, factor: float) -> Call:
    """The call in which `keys` `(batch or 1, n_k)` count `factor` times as much: ln(factor) is
    added to their scores."""
    by_key = math.log(factor) * keys[:, None, :, None].to(call.query.dtype)
    return with_product(call, torch.ones_like(call.query[..., :1]), by_key)


def with_product(call: Call, by_query: Tensor, by_key: Tensor) -> Call:
    """The call with sum_m by_query[i, m] by_key[j, m] added to its scores.

    by_query `(batch, heads, n_q, m)`, by_key `(batch or 1, heads or 1, n_k, m)`. Where a soft-cap
    comes between products and scores, the sum is a tensor `(batch, heads, n_q, n_k)`.
    """
    batch, heads = call.query.shape[:2]
    kv_heads = call.key.shape[1]
    by_key = by_key.to(call.query.dtype).expand(batch, -1, -1, -1)
    by_query = by_query.to(call.query.dtype)
    if call.softcap is not None:
        return call.biased(by_query @ by_key.transpose(-1, -2))
    if by_key.shape[1] != 1 and kv_heads != heads:
        # query heads that share their keys have coordinates of their own there
        group, m = heads // kv_heads, by_key.shape[-1]
        by_key = by_key.unflatten(1, (kv_heads, group)).permute(0, 1, 3, 2, 4).flatten(-2)
        place = torch.eye(group, device=by_query.device, dtype=by_query.dtype).repeat(kv_heads, 1)
        by_query = (place[None, :, None, :, None] * by_query[..., None, :]).flatten(-2)
        assert by_query.shape[-1] == group * m
    by_key = by_key.expand(-1, kv_heads, -1, -1)
    return call.but(
        query=torch.cat([call.query, by_query / call.scale], -1),
        key=torch.cat([call.key, by_key], -1),
    )
