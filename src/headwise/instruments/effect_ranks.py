"""Ranks of heads, or of places, by two numbers."""

from __future__ import annotations

import numpy as np

__all__ = ["rank_correlation", "ranks"]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: of the ranks, equal numbers sharing theirs; NaN is left out. NaN where one of
    them does not vary."""
    known = ~(np.isnan(a) | np.isnan(b))
    mine, theirs = ranks(a[known]), ranks(b[known])
    if known.sum() < 2 or mine.std() == 0 or theirs.std() == 0:
        return float("nan")
    return float(np.corrcoef(mine, theirs)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal ones share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place], dtype=np.float64)
