"""Generic relevance of two streams that attend to themselves and to each other, as whole matrices.

Chefer, Gur and Wolf 2021 (arXiv 2103.15679), equations 5 to 11. Here R^ss grows by A_bar R^qs and
R^sq by (N^ss)^T A_bar N^qq, so that a row of one needs rows and columns of all others, more of
them with every layer: no product of vectors will do, and the lengths are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["LIMIT", "bimodal", "fused_slopes", "normalized"]

LIMIT = 4096
"""Longest stream whose square is held."""

Step = tuple[str, str, Tensor]


def bimodal(layers: Sequence[Sequence[Step]]) -> Mapping[tuple[str, str], Tensor]:
    """R of every pair of streams `(..., n_s, n_q)`, by (stream of the queries, of the inputs).

    layers: what runs, in order; each holds the attentions that run side by side, from the same
    R: (stream of the queries, stream of the keys, A_bar `(..., n_q, n_k)`), see `fused_slopes`.
    Raises ValueError where streams are longer than 4,096 or the shapes of a stream differ.
    """
    sizes: dict[str, int] = {}
    like: Tensor | None = None
    for asking, asked, weights in (step for layer in layers for step in layer):
        like = weights
        for stream, size in zip((asking, asked), weights.shape[-2:], strict=True):
            if sizes.setdefault(stream, size) != size:
                raise ValueError(f"stream {stream!r} has {sizes[stream]} positions, and {size}")
    if like is None:
        raise ValueError("there are no attentions")
    if max(sizes.values()) > LIMIT:
        raise ValueError(
            f"streams of {max(sizes.values()):,} positions: relevance of two streams holds whole "
            f"matrices, and takes {LIMIT:,} at most"
        )
    front = like.shape[:-2]
    found = {
        (s, q): like.new_zeros(*front, n, m) for s, n in sizes.items() for q, m in sizes.items()
    }
    for stream in sizes:
        found[stream, stream].diagonal(dim1=-2, dim2=-1).fill_(1)
    for layer in layers:
        more: list[tuple[tuple[str, str], Tensor]] = []
        for s, q, weights in layer:
            if s == q:
                more += [((s, t), weights @ found[s, t]) for t in sizes]
            else:
                crossed = normalized(found[s, s]).mT @ weights @ normalized(found[q, q])
                more += [((s, q), crossed), ((s, s), weights @ found[q, s])]
        for key, value in more:
            found[key] = found[key] + value
    return found


def normalized(relevance: Tensor) -> Tensor:
    """What lies beside the identity as shares of its row sums, plus the identity `(..., n, n)`."""
    own = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    beside = relevance - own
    sums = beside.sum(-1, keepdim=True)
    return beside / torch.where(sums == 0, torch.inf, sums) + own


def fused_slopes(weights: Tensor, slopes: Tensor) -> Tensor:
    """A_bar `(..., n_q, n_k)` of maps and their gradients `(..., heads, n_q, n_k)`."""
    return (weights * slopes).clamp(min=0).mean(-3)
