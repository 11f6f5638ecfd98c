"""The obviously right engine: hold the whole matrix. Everything else is tested against it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from headwise.maps.scores import Scores


def grouped(values: Tensor, heads: int) -> Tensor:
    """View `(batch, kv_heads, n, d)` as `(batch, heads, n, d)`: each group shares its entry."""
    batch, kv, n, d = values.shape
    return values[:, :, None].expand(batch, kv, heads // kv, n, d).reshape(batch, heads, n, d)


class DenseEngine:
    """Statistics of the map `(batch, heads, n_q, n_k)`, each the textbook formula."""

    name = "dense"

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    @cached_property
    def logits(self) -> Tensor:
        return self.scores.rows(torch.arange(self.scores.n_q, device=self.scores.device))

    @cached_property
    def lse(self) -> Tensor:
        lse = torch.logsumexp(self.logits, -1)
        if self.scores.sinks is not None:
            lse = torch.logaddexp(lse, self.scores.sinks.to(lse.dtype)[None, :, None])
        return lse

    @cached_property
    def log_map(self) -> Tensor:
        """log P, -inf where nothing is seen."""
        empty = self.lse == float("-inf")
        return self.logits - self.lse.masked_fill(empty, 0.0)[..., None]

    @cached_property
    def map(self) -> Tensor:
        return self.log_map.exp()

    def apply(self, values: Tensor) -> Tensor:
        return self.map @ grouped(values.to(self.map.dtype), self.scores.heads)

    def transpose_apply(self, weights: Tensor) -> Tensor:
        return (self.map.transpose(-1, -2) @ weights.to(self.map.dtype)[..., None])[..., 0]

    def entropy(self) -> Tensor:
        return torch.special.entr(self.map).sum(-1)

    def max(self) -> Tensor:
        return self.map.amax(-1) if self.scores.n_k else self.map.sum(-1)

    def collision(self) -> Tensor:
        return self.map.square().sum(-1)

    def distance_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of i - j under each row of the map, given that a key is looked at."""
        p = self.map
        i = self.scores.positions().to(p.dtype)
        j = torch.arange(self.scores.n_k, device=p.device, dtype=p.dtype)
        distance = i[:, None] - j[None, :]
        mass = p.sum(-1)
        seen = mass.clamp_min(torch.finfo(p.dtype).tiny)
        mean = (p * distance).sum(-1) / seen
        variance = (p * (distance - mean[..., None]) ** 2).sum(-1) / seen
        return mean, variance

    def inner(self, other: Scores) -> Tensor:
        return (self.map * DenseEngine(other).map).sum(-1)

    def kl(self, other: Scores) -> Tensor:
        theirs = DenseEngine(other)
        gap = self.log_map - theirs.log_map
        return torch.where(self.map > 0, self.map * gap, torch.zeros_like(gap)).sum(-1)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        values, index = self.map.topk(k, dim=-1)
        return values, index.masked_fill(values == 0, -1)


def attend(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    """out `(batch, heads, n_q, d_v)` in the compute type and lse `(batch, heads, n_q)`."""
    engine = DenseEngine(scores)
    return engine.apply(v), engine.lse
