"""The measured curve of a search: what every round took away, what is left, what it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from headwise.compress.search.quality import Quality
from headwise.models.atomic import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Point:
    """A model on the way. `left`: share of the original that is left, by what is counted (params,
    bytes, flops, time, kv; those that were measured). `took`: what this round took, in words."""

    left: dict[str, float]
    quality: Quality
    took: tuple[str, ...] = ()
    seconds: float = 0.0
    within: bool = True
    """Whether the bounds on quality hold."""


@dataclass
class Curve:
    """Every point that was measured, the original first. `chosen`: number of the point that `model`
    is, the smallest whose quality is within the bounds. `met`: whether it is within the budget.

    `about`: what was asked and on what it was measured. `cache`: for a key-value budget, the
    settings of the HeadCache to use. `original`: what the shares are of.
    """

    what: str
    share: float
    points: list[Point]
    chosen: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    original: dict[str, float] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def met(self) -> bool:
        """Whether the chosen point is within the budget."""
        if not self.points:
            return False
        return self.points[self.chosen].left[self.what] <= self.share * (1 + 1e-9)

    @property
    def best(self) -> Point:
        """The chosen point."""
        return self.points[self.chosen]

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """(column names, a row for each point)"""
        counted = list(self.points[0].left)
        names = ["round", *counted, "loss", "change", "+/-", "agreement", "kl", "took"]
        rows = [
            [
                f"{number}{' *' if number == self.chosen else ''}",
                *(point.left[name] for name in counted),
                point.quality.loss,
                point.quality.loss_change,
                point.quality.loss_error,
                point.quality.agreement,
                point.quality.kl,
                summary(point.took),
            ]
            for number, point in enumerate(self.points)
        ]
        return names, rows

    def __str__(self) -> str:
        names, rows = self.table()
        lines = [
            "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row)
            for row in rows
        ]
        return "\n".join(["  ".join(names), *lines])

    def record(self) -> dict[str, Any]:
        """All but the model, as JSON takes it."""
        points = [{**asdict(point), "quality": point.quality.as_dict()} for point in self.points]
        return {
            "format": FORMAT,
            "keep": {self.what: self.share},
            "met": self.met,
            "chosen": self.chosen,
            "original": self.original,
            "cache": self.cache,
            "points": points,
            "about": self.about,
        }

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, (json.dumps(self.record(), indent=1) + "\n").encode())

    @staticmethod
    def load(path: Path) -> Curve:
        """Raises ValueError for what is no curve, FileNotFoundError."""
        try:
            known = json.loads(path.read_text("utf-8"))
            if known["format"] != FORMAT:
                raise ValueError(f"format {known['format']}, this version reads {FORMAT}")
            ((what, share),) = known["keep"].items()
            points = [_point(one) for one in known["points"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no curve of `headwise shrink`: {error}") from None
        return Curve(
            what, share, points, known["chosen"], known["about"], known["original"], known["cache"]
        )


def summary(took: Sequence[str]) -> str:
    """What a round took, short: "3 heads of L4, L2 attention"."""
    return ", ".join(took[:6]) + (f" and {len(took) - 6} more" if len(took) > 6 else "")


def _point(known: dict[str, Any]) -> Point:
    figures: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in known["quality"].items()
    }
    made = Point(**{**known, "quality": Quality(**figures)})
    return replace(made, took=tuple(made.took))
