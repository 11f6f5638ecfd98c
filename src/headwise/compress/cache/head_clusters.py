"""Heads of a layer whose maps agree, found by the correlation of the maps on a few tokens.

Where several heads look at the same tokens, one of them can look for all: its queries and keys
give the map, and every head keeps its own values (CHAI, Agarwal et al. 2024, arXiv 2403.08058,
sections 3 and 4). How many clusters a layer needs is a property of the model and is measured once,
at the elbow of the clustering error; who is in which cluster is seen on the first tokens of each
text. Clusters are made around medoids, since it is a head, not a mean, that stands for the others.

With grouped heads it is the key-value heads that are clustered, by the maps of all query heads of
their group in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.cache.layer_bits import cached_attentions
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import AttentionReading, ModelView, observe

TOKENS = 5
"""How many tokens tell the clusters of a text, as in the paper."""


@dataclass(frozen=True)
class HeadClusters:
    """`of[layer][head]`: the key-value head whose queries and keys serve this one (its own, where
    it stands for a cluster)."""

    of: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, heads in enumerate(self.of):
            for head, leader in enumerate(heads):
                if not 0 <= leader < len(heads) or heads[leader] != leader:
                    raise ValueError(
                        f"layer {layer}: head {head} is to be served by {leader}, which is no head "
                        "that serves itself"
                    )

    @property
    def counts(self) -> tuple[int, ...]:
        """Clusters of each layer."""
        return tuple(len(set(heads)) for heads in self.of)

    @property
    def kept_keys(self) -> float:
        """Share of the keys that are still held."""
        return sum(self.counts) / sum(len(heads) for heads in self.of)


@torch.no_grad()
def map_correlations(
    model: nn.Module | ModelView, inputs: Any, tokens: int = 64, **reading: Any
) -> list[Tensor]:
    """For every layer with a cache, the correlations `(kv_heads, kv_heads)` of the heads' maps on
    the first `tokens` of all texts, float64.

    inputs, `reading`: as for `read_examples`. Raises ValueError for texts of one token.
    """
    look = model_view(model)
    layers = cached_attentions(look)
    place = {attention: n for n, attention in enumerate(layers)}
    sums = [_Sums(attention.kv_heads) for attention in layers]

    def read(seen: AttentionReading) -> None:
        at = place.get(seen.attention)
        if at is not None:
            for one in first_maps(seen, layers[at].kv_heads, tokens):
                sums[at].add(one)

    with evaluating(look.model), observe(look, read):
        for batch in read_examples(look.model, inputs, **reading):
            look.model(**batch.given)
    return [one.correlation() for one in sums]


def first_maps(seen: AttentionReading, kv_heads: int, tokens: int) -> list[Tensor]:
    """For each sequence the maps of its first real tokens, `(kv_heads, numbers)`: those of a group
    one behind the other, without the first row (which is 1 in every head) and the future."""
    n = seen.key.shape[2]
    starts = [0] * len(seen.query)
    if seen.padding is not None:
        starts = seen.padding.int().argmax(-1).tolist()
    if min(n - max(starts), tokens) < 2:
        raise ValueError(f"maps of {min(n - max(starts), tokens)} tokens tell nothing: give more")
    weights = {
        start: seen.map.tile(slice(start, start + tokens), slice(start, start + tokens))
        for start in set(starts)
    }
    return [flat_maps(weights[start][b], kv_heads) for b, start in enumerate(starts)]


def flat_maps(weights: Tensor, kv_heads: int) -> Tensor:
    """Causal maps `(heads, n, n)` as lines `(kv_heads, numbers)`, as `first_maps` says."""
    n = weights.shape[-1]
    past = torch.ones(n, n, dtype=torch.bool, device=weights.device).tril()
    past[0] = False
    return weights[:, past].double().reshape(kv_heads, -1)


class _Sums:
    """What correlations of `heads` lines are made of, line by line."""

    def __init__(self, heads: int) -> None:
        self.count = 0
        self.first = torch.zeros(heads, dtype=torch.float64)
        self.second = torch.zeros(heads, heads, dtype=torch.float64)

    def add(self, lines: Tensor) -> None:
        lines = lines.cpu()
        self.count += lines.shape[1]
        self.first += lines.sum(1)
        self.second += lines @ lines.T

    def correlation(self) -> Tensor:
        mean = self.first / self.count
        covariance = self.second / self.count - mean[:, None] * mean
        size = covariance.diagonal().clamp_min(1e-18).sqrt()
        return (covariance / (size[:, None] * size)).fill_diagonal_(1.0)


def correlation_of(lines: Tensor) -> Tensor:
    """Correlations `(heads, heads)` of lines `(heads, numbers)`."""
    sums = _Sums(len(lines))
    sums.add(lines.double())
    return sums.correlation()


def cluster(correlations: Tensor, k: int) -> tuple[int, ...]:
    """k clusters of heads around medoids: for each head the one that stands for it.

    Least sum of 1 - correlation: begun greedily, then improved by exchanging a medoid as long as
    that helps (PAM, Kaufman and Rousseeuw 1990). Raises ValueError for a k that cannot be.
    """
    distance = (1 - correlations).clamp_min(0.0)
    heads = len(distance)
    if not 1 <= k <= heads:
        raise ValueError(f"k={k}: expected 1 to {heads} clusters")
    medoids: list[int] = []
    nearest = torch.full((heads,), torch.inf, dtype=distance.dtype)
    for _ in range(k):
        cost = torch.minimum(nearest[:, None], distance).sum(0)
        cost[medoids] = torch.inf
        medoids.append(int(cost.argmin()))
        nearest = torch.minimum(nearest, distance[:, medoids[-1]])
    best = float(nearest.sum())
    while True:
        trial = (best - 1e-12, -1, -1)
        for at in range(k):
            others = medoids[:at] + medoids[at + 1 :]
            rest = torch.full((heads,), torch.inf, dtype=distance.dtype)
            if others:
                rest = distance[:, others].amin(1)
            cost = torch.minimum(rest[:, None], distance).sum(0)
            cost[medoids] = torch.inf
            new = int(cost.argmin())
            trial = min(trial, (float(cost[new]), at, new))
        if trial[1] < 0:
            break
        best, medoids[trial[1]] = trial[0], trial[2]
    medoids.sort()
    found = [medoids[int(i)] for i in distance[:, medoids].argmin(1)]
    for medoid in medoids:
        found[medoid] = medoid
    return tuple(found)


def clustering_error(correlations: Tensor, of: Sequence[int]) -> float:
    """Sum over heads of 1 - correlation with the head that stands for them."""
    heads = torch.arange(len(of))
    return float((1 - correlations[heads, torch.tensor(of)]).sum())


def elbow(errors: Sequence[float]) -> int:
    """The number of clusters, 1 to len(errors), where the error stops falling: the point that lies
    furthest under the line from the first to the last. 1 where one cluster has no error."""
    if len(errors) == 1 or errors[0] <= 1e-9:
        return 1
    last = len(errors) - 1
    below = [
        errors[0] + (errors[last] - errors[0]) * k / last - error for k, error in enumerate(errors)
    ]
    best = max(below)
    if best <= 1e-9 * errors[0]:
        return len(errors)  # a straight line: nobody stands for anybody
    return next(k for k, under in enumerate(below) if under >= best - 1e-12) + 1


def find_clusters(
    model: nn.Module | ModelView,
    inputs: Any,
    keep: float | Sequence[int] | None = None,
    tokens: int = 64,
    **reading: Any,
) -> HeadClusters:
    """Clusters of the heads of every layer, by their maps on calibration text.

    keep: None for the elbow of each layer, a share of the heads, or the number of clusters of each
    layer. inputs, tokens, `reading`: as for `map_correlations`. Raises ValueError for a `keep`
    that cannot be.
    """
    found = map_correlations(model, inputs, tokens, **reading)
    sizes = [len(correlations) for correlations in found]
    if keep is None:
        counts = [
            elbow([clustering_error(c, cluster(c, k)) for k in range(1, len(c) + 1)]) for c in found
        ]
    elif isinstance(keep, float | int):
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: expected a share above 0, 1 at most")
        counts = [max(1, round(keep * size)) for size in sizes]
    else:
        counts = list(keep)
        if len(counts) != len(sizes):
            raise ValueError(
                f"keep has {len(counts)} numbers of clusters, and there are {len(sizes)} layers"
            )
    return HeadClusters(tuple(cluster(c, k) for c, k in zip(found, counts, strict=True)))
