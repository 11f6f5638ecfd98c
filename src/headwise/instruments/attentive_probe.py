"""Attentive probes: learned queries decide which positions a probe reads.

For features spread over tokens (masked image models), reading one token or their mean loses most;
an attention with learned queries pools them. Psomas et al. 2025, arXiv 2506.10178 (efficient
probing): queries stand in the features' own space, so keys need no projection; each query pools a
slice of the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AttentiveProbe", "fit_attentive"]


class AttentiveProbe(nn.Module):
    """Tokens `(batch, n, dim)` to scores `(batch, classes)`.

    `queries`: M of them, each `(dim,)`. `values`: width that tokens are projected to before they
    are pooled, M slices of it; None pools the tokens themselves. Raises ValueError where `values`
    (or dim) is no multiple of M.
    """

    def __init__(self, dim: int, classes: int, queries: int = 1, values: int | None = None) -> None:
        super().__init__()
        width = dim if values is None else values
        if width % queries:
            raise ValueError(f"values of {width} do not split among {queries} queries")
        self.queries = nn.Parameter(torch.randn(queries, dim) * dim**-0.5)
        self.values = None if values is None else nn.Linear(dim, values, bias=False)
        self.read = nn.Linear(width, classes)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def maps(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Where the queries look: `(batch, queries, n)`; rows sum to 1."""
        scores = torch.einsum("bnd,md->bmn", x, self.queries) / math.sqrt(x.shape[-1])
        if real is not None:
            scores = scores.masked_fill(~real[:, None], -math.inf)
        return scores.softmax(-1)

    def pool(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """`(batch, values)`."""
        values = x if self.values is None else self.values(x)
        slices = values.unflatten(-1, (len(self.queries), -1))
        return torch.einsum("bmn,bnmd->bmd", self.maps(x, real), slices).flatten(1)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """real `(batch, n)`: True where a token counts."""
        scores: Tensor = self.read(self.pool(x, real))
        return scores


def fit_attentive(
    x: Tensor,
    y: Tensor,
    classes: int,
    real: Tensor | None = None,
    queries: int = 1,
    values: int | None = None,
    steps: int = 300,
    rate: float = 1e-2,
    decay: float = 1e-3,
    size: int = 256,
    seed: int = 0,
) -> AttentiveProbe:
    """By AdamW on `size` random examples a step; x `(examples, n, dim)`, best brought to mean 0 and
    deviation 1. Random numbers are from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentiveProbe(x.shape[-1], classes, queries, values)
    random = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=decay)
    with torch.enable_grad():
        for step in range(steps):
            adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            some = torch.randperm(len(x), generator=random)[:size]
            mask = None if real is None else real[some]
            loss = F.cross_entropy(probe(x[some], mask), y[some])
            adam.zero_grad()
            loss.backward()
            adam.step()
    return probe.eval()
