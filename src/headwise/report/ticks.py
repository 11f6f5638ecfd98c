"""Where the numbers of an axis stand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """From values to a share of the axis, 0 to 1, and the values that are written beside it."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where a value stands, 0 at the low end."""
        to: Callable[[float], float] = math.log10 if self.log else float
        return (to(value) - to(self.low)) / (to(self.high) - to(self.low))


def axis(values: list[float], log: bool, most: int = 6) -> Axis:
    """An axis for finite values; raises ValueError where there is none, or where a logarithm
    meets what is not above zero."""
    if not values:
        raise ValueError("a picture needs at least one finite value on each axis")
    low, high = min(values), max(values)
    if log:
        if low <= 0:
            raise ValueError(f"a logarithmic axis takes values above zero, not {low}")
        return _powers(low, high, most)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = _step((high - low) / (most - 1))
    # what only rounding has moved beyond a tick asks for no further one
    low, high = math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step
    count = round((high - low) / step)
    return Axis(low, high, False, tuple(low + step * i for i in range(count + 1)))


def _step(rough: float) -> float:
    """The round number at or above it: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _powers(low: float, high: float, most: int) -> Axis:
    """Powers of ten; with 1, 2, 5 times them where there are few, and even steps where there is
    none."""
    bottom, top = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if top - bottom <= 2:
        found = [m * 10.0**e for e in range(bottom, top + 1) for m in (1, 2, 5)]
        inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
    else:
        every = max(1, math.ceil((top - bottom) / (most - 1)))
        inside = [10.0**e for e in range(bottom, top + 1, every)]
        low, high = min(low, inside[0]), max(high, inside[-1])
    if low == high:
        low, high = low / 2, high * 2
    if len(inside) < 2:
        step = _step((high - low) / (most - 1))
        inside = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(low, high, True, tuple(inside))


def written(value: float) -> str:
    """A tick: short, thousands apart, tiny and huge as powers."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
