"""What deletion or insertion of positions did: curves, the areas under them, and their errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas

__all__ = ["RANDOM", "Curves", "Gain"]

RANDOM = "random orders"
"""What the mean over random orders is called among the curves."""


class Gain(NamedTuple):
    """A mean over examples and its standard error, in units of the score."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


@dataclass(frozen=True, eq=False)
class Curves:
    """Scores while positions are taken away or put back.

    mode: "deletion" or "insertion"; target: what is scored, in words; shares `(steps + 1,)`: of
    positions that are gone (back); curves: order -> `(examples, steps + 1)`, each attribution and
    its reverse ("NAME, reversed"); random `(examples, steps + 1)`: the mean over random orders.
    """

    mode: str
    target: str
    shares: np.ndarray
    curves: Mapping[str, np.ndarray]
    random: np.ndarray

    def area(self, name: str) -> np.ndarray:
        """The area under an example's curve `(examples,)`: its mean score. RANDOM is one too."""
        curve = self.random if name == RANDOM else self._curve(name)
        middle = (curve[:, 1:] + curve[:, :-1]) / 2
        return np.asarray((middle * np.diff(self.shares)).sum(1))

    def gain(self, name: str, over: str = RANDOM) -> Gain:
        """How much better an order is than another, in area; above 0 is better, for deletion
        (where a smaller area is) as for insertion. The error is over examples, paired."""
        gains = self.area(name) - self.area(over)
        gains = -gains if self.mode == "deletion" else gains
        count = len(gains)
        error = float(gains.std(ddof=1) / count**0.5) if count > 1 else float("nan")
        return Gain(float(gains.mean()), error)

    def frame(self) -> pandas.DataFrame:
        """A pandas data frame, one row an order: order, area, gain over random, error.

        Raises ImportError if pandas is not installed (extra: frame).
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Curves.frame() needs pandas, which is not installed: pip install 'headwise[frame]'"
            ) from error
        rows = [(name, self.area(name).mean(), *self.gain(name)) for name in self.curves]
        rows.append((RANDOM, self.area(RANDOM).mean(), 0.0, 0.0))
        return pandas.DataFrame(rows, columns=["order", "area", "gain", "error"])

    def lines(self) -> dict[str, tuple[list[float], list[float]]]:
        """Mean curves by name, as (shares, scores): what a figure shows."""
        every = {**self.curves, RANDOM: self.random}
        return {name: (self.shares.tolist(), c.mean(0).tolist()) for name, c in every.items()}

    def _curve(self, name: str) -> np.ndarray:
        if name not in self.curves:
            raise LookupError(f"no order {name!r}; there are {', '.join(self.curves)}, {RANDOM}")
        return self.curves[name]
