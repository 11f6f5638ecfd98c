"""An even share spread over layers by what each was measured to need."""

from __future__ import annotations

import math
from collections.abc import Sequence

_GRID = 64  # steps of an even share


def spread(levels: Sequence[float], losses: Sequence[Sequence[float]], mean: float) -> list[float]:
    """The level of each layer with the least sum of losses whose mean is at most `mean`.

    losses: `[layer][level]`, of that layer alone. Exact on a grid of 1/64 of the mean, by dynamic
    programming; levels are rounded up to it, so that the mean is never exceeded. Raises ValueError
    where even the lowest levels are above the mean.
    """
    costs = [math.ceil(level * _GRID / mean - 1e-9) for level in levels]
    most = _GRID * len(losses)
    if min(costs) > _GRID:
        raise ValueError(f"a mean of {mean} is under the lowest level, {min(levels)}")
    # best[spent] = (sum of losses, levels chosen)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in losses:
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (total, chosen) in best.items():
            for number, loss in enumerate(row):
                now = spent + costs[number]
                if now > most:
                    continue
                candidate = (total + loss, (*chosen, number))
                if now not in after or candidate < after[now]:
                    after[now] = candidate
        best = after
    _, chosen = min(best.values())
    return [float(levels[number]) for number in chosen]
