"""Where in depth a concept can first be read off: from a probe's score at each layer.

Jin et al. 2024, arXiv 2404.07066, section 3: with alpha_i the score at layer i of d and
beta_i = alpha_i / alpha_(i-1), the jump point is the first i/d with beta_i >= 1.1, the converging
point the last i/d with |beta_i - 1| < 0.03.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["converging_point", "first_layer_at", "jump_point"]

Scores = Sequence[float] | np.ndarray


def jump_point(scores: Scores, ratio: float = 1.1) -> float | None:
    """The first depth (share of the layers, above 0 up to 1) at which the score grows by `ratio`;
    None where it never does. scores `(layers + 1,)`, or as many as there are."""
    rises = _rises(scores)
    found = np.flatnonzero(rises >= ratio)
    return float((found[0] + 1) / len(rises)) if len(found) else None


def converging_point(scores: Scores, change: float = 0.03) -> float | None:
    """The last depth at which the score changes by less than `change` of itself; None if none."""
    rises = _rises(scores)
    found = np.flatnonzero(np.abs(rises - 1) < change)
    return float((found[-1] + 1) / len(rises)) if len(found) else None


def first_layer_at(scores: Scores, share: float = 0.97, chance: float = 0.0) -> int:
    """The first layer whose score is `share` of the way from `chance` to the best one: ours, which
    a plateau before the rise does not disturb. 0 is the embedding."""
    given = np.asarray(scores, dtype=np.float64)
    if not len(given) or not 0 < share <= 1:
        raise ValueError(f"{len(given)} scores, share={share}: expected scores, and 0 < share <= 1")
    wanted = chance + share * (given.max() - chance)
    return int(np.flatnonzero(given >= wanted - 1e-12)[0])


def _rises(scores: Scores) -> np.ndarray:
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim != 1 or len(given) < 2 or (given <= 0).any():
        raise ValueError(f"scores {given.tolist()}: expected two or more, above 0")
    return np.asarray(given[1:] / given[:-1])
