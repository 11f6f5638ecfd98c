"""How many directions a cloud of activations really has: intrinsic dimension, and anisotropy.

two_nn    Facco et al. 2017, arXiv 1803.06992: of each point, mu = (distance to the second nearest
          neighbour) / (distance to the nearest); where density is even at that scale
          P(mu > m) = m^-d, so d is found from the mus alone
levina_bickel   Levina and Bickel 2004: by maximum likelihood from distances to k neighbours, the
          inverse averaged over points (MacKay and Ghahramani 2005)
anisotropy   Ethayarajh 2019, arXiv 1909.00512: mean cosine of two different rows
effective_rank  participation ratio of the covariance's eigenvalues, (sum l)^2 / sum l^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.features import Position, collect_features, probed_sites
from headwise.models import ModelView

__all__ = ["Dimensions", "anisotropy", "dimensions", "effective_rank", "levina_bickel", "two_nn"]

_BLOCK = 1024  # rows whose distances to all others are held at a time


def neighbour_distances(x: Tensor, count: int) -> Tensor:
    """Distances of each row of x `(rows, d)` to its `count` nearest others, nearest first:
    `(rows, count)` float64. Exact; blocks of 1024 rows at a time."""
    x = x.double()
    x = x - x.mean(0)  # differences of large numbers would lose digits
    rows = len(x)
    if rows <= count:
        raise ValueError(f"{rows} rows have no {count} neighbours each: give more")
    found = []
    for start in range(0, rows, _BLOCK):
        block = x[start : start + _BLOCK]
        far = torch.cdist(block, x, compute_mode="donot_use_mm_for_euclid_dist")
        far[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        found.append(far.topk(count, dim=1, largest=False).values)
    return torch.cat(found)


def two_nn(x: Tensor, discard: float = 0.1) -> float:
    """Intrinsic dimension of rows x `(rows, d)`: the slope through 0 of -log(1 - F(mu)) over
    log(mu), F being the rank of mu among all; the largest `discard` are left out, as in the paper.

    Rows that stand twice count once. Raises ValueError for fewer than 10 different rows.
    """
    x = torch.unique(x, dim=0)
    if len(x) < 10:
        raise ValueError(f"{len(x)} different rows are too few for a dimension: 10 or more")
    near = neighbour_distances(x, 2)
    mu = (near[:, 1] / near[:, 0]).sort().values
    rows = len(mu)
    kept = int(rows * (1 - discard))
    share = torch.arange(1, rows + 1, dtype=torch.float64)[:kept] / rows
    a, b = mu[:kept].log(), -torch.log1p(-share)
    if discard == 0:  # the last one's share is 1, at infinity
        a, b = a[:-1], b[:-1]
    return float((a * b).sum() / (a * a).sum())


def levina_bickel(x: Tensor, k: int = 20) -> float:
    """Intrinsic dimension of rows x `(rows, d)` from k neighbours each.

    Rows that stand twice count once. Raises ValueError for k < 3 or no more than k different rows.
    """
    if k < 3:
        raise ValueError(f"k={k}: expected 3 neighbours or more")
    near = neighbour_distances(torch.unique(x, dim=0), k)
    # of each point 1/d = mean over its k - 1 nearer neighbours of log(T_k / T_j)
    inverse = (near[:, -1:] / near[:, :-1]).log().mean(1)
    return float(1 / inverse.mean())


def anisotropy(x: Tensor) -> float:
    """Mean cosine of two different rows of x `(rows, d)`: 0 where directions are even."""
    unit = nn.functional.normalize(x.double(), dim=1)
    rows = len(unit)
    if rows < 2:
        raise ValueError("anisotropy is of two rows or more")
    return float((unit.sum(0).pow(2).sum() - unit.pow(2).sum()) / (rows * (rows - 1)))


def effective_rank(x: Tensor) -> float:
    """(sum l)^2 / sum l^2 of the covariance's eigenvalues, from 1 to d."""
    x = x.double() - x.double().mean(0)
    gram = x.mT @ x if x.shape[1] <= x.shape[0] else x @ x.mT
    return float(gram.diagonal().sum() ** 2 / gram.pow(2).sum())


@dataclass(eq=False)
class Dimensions:
    """By layer `(layers,)`, from what the first reads to what the last leaves. rows: how many
    activations were taken; error: standard error of two_nn over random halves of the rows."""

    names: list[str]
    two_nn: np.ndarray
    error: np.ndarray
    levina_bickel: np.ndarray
    anisotropy: np.ndarray
    effective_rank: np.ndarray
    rows: int

    def __repr__(self) -> str:
        width = max(map(len, self.names))
        lines = [f"{'':<{width}}  TwoNN   +-   MLE   rank  cosine   of {self.rows} activations"]
        for n, name in enumerate(self.names):
            lines.append(
                f"{name:<{width}}  {self.two_nn[n]:5.1f} {self.error[n]:4.1f} "
                f"{self.levina_bickel[n]:5.1f} {self.effective_rank[n]:6.1f}  "
                f"{self.anisotropy[n]:6.3f}"
            )
        return "\n".join(lines)


def dimensions(
    model: nn.Module | ModelView,
    inputs: Any,
    site: str = "residual",
    position: Position = "each",
    *,
    layers: Sequence[int] | None = None,
    most: int = 2000,
    k: int = 20,
    seed: int = 0,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    windows: int | None = None,
    batch_size: int = 8,
) -> Dimensions:
    """The geometry of activations layer by layer.

    site, position: as for `probe` (not one with heads). most: activations that are taken, at random
    by `seed`; distances are exact and cost most^2 x width.
    """
    if site in ("heads", "queries", "keys", "values"):
        raise ValueError(f"site={site!r} has heads; take residual, attention, mlp or neurons")
    view = model_view(model)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    sites = probed_sites(view, site, layers, None)
    features = collect_features(view, batches, sites, position)
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(features.example), generator=random)[:most]
    halves = [torch.randperm(len(chosen), generator=random)[: len(chosen) // 2] for _ in range(4)]
    found: dict[str, list[float]] = {name: [] for name in _MEASURES}
    for here in sites:
        x = features.values[here][chosen]
        parts = [two_nn(x[half]) for half in halves]
        found["two_nn"].append(two_nn(x))
        found["error"].append(float(np.std(parts, ddof=1)) / 2**0.5)
        found["levina_bickel"].append(levina_bickel(x, k))
        found["anisotropy"].append(anisotropy(x))
        found["effective_rank"].append(effective_rank(x))
    measured = {name: np.array(values) for name, values in found.items()}
    return Dimensions([str(s) for s in sites], rows=len(chosen), **measured)


_MEASURES = ("two_nn", "error", "levina_bickel", "anisotropy", "effective_rank")
