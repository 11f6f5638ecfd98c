"""What patching found: a number for every place that was patched, on every example."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.instruments.effect_ranks import rank_correlation

if TYPE_CHECKING:
    import pandas

__all__ = ["PatchTable", "rank_correlation"]


@dataclass(frozen=True, eq=False)
class PatchTable:
    """The metric after each patch, by place and example.

    examples: `(examples, *places)`, the metric with that place patched; NaN where a layer has no
        such head. clean, corrupted: `(examples,)`, the metric of either run as it is.
    axes: name -> labels, in the order of the places, such as {"layer": ..., "position": ...}.
    site, metric, unit, direction, method: what was patched, and how it was measured.
    """

    examples: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray
    axes: dict[str, tuple[str, ...]]
    site: str
    metric: str
    unit: str = "score"
    direction: str = "denoise"
    method: str = "exact"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = (len(self.clean), *map(len, self.axes.values()))
        if self.examples.shape != wanted or self.clean.shape != self.corrupted.shape:
            raise ValueError(
                f"examples {self.examples.shape}, clean {self.clean.shape}, corrupted "
                f"{self.corrupted.shape}: expected {wanted}, ({wanted[0]},) twice"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """How many places along each axis."""
        return tuple(map(len, self.axes.values()))

    @cached_property
    def values(self) -> np.ndarray:
        """Mean of the metric over the examples, by place."""
        mean: np.ndarray = self.examples.mean(0)
        return mean

    @cached_property
    def errors(self) -> np.ndarray:
        """Standard error of `values`; NaN for one example."""
        return _error(self.examples)

    @property
    def gap(self) -> float:
        """Mean metric of the clean run less that of the corrupted one."""
        return float(self.clean.mean() - self.corrupted.mean())

    @cached_property
    def normalised(self) -> np.ndarray:
        """(patched - corrupted) / (clean - corrupted), of the means: 1 where a patch makes the
        run as good as the clean one, 0 where as bad as the corrupted one, in either direction.
        NaN where both runs are equally good."""
        if self.gap == 0:
            return np.full(self.shape, np.nan)
        share: np.ndarray = (self.values - self.corrupted.mean()) / self.gap
        return share

    @cached_property
    def normalised_errors(self) -> np.ndarray:
        """Standard error of `normalised`, a ratio of means, to first order (delta method)."""
        if self.gap == 0:
            return np.full(self.shape, np.nan)
        shape = (-1, *[1] * len(self.shape))
        low = self.corrupted.reshape(shape)
        off = (self.examples - low) - self.normalised * (self.clean.reshape(shape) - low)
        return _error(off) / abs(self.gap)

    @cached_property
    def normalised_examples(self) -> np.ndarray:
        """The same ratio for each example; large where an example's two runs hardly differ."""
        shape = (-1, *[1] * len(self.shape))
        low, high = self.corrupted.reshape(shape), self.clean.reshape(shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            share: np.ndarray = (self.examples - low) / (high - low)
        return share

    @cached_property
    def effects(self) -> np.ndarray:
        """Mean change that a patch makes to the run that it is made in."""
        base = self.corrupted if self.direction == "denoise" else self.clean
        found: np.ndarray = self.values - base.mean()
        return found

    def top(self, n: int = 10) -> list[dict[str, Any]]:
        """The n places whose patch changes the metric most, either way; what each axis says of
        them, `index`, `value`, `error`, `normalised`, `effect`."""
        effects = self.effects
        order = np.argsort(-np.abs(effects), axis=None, kind="stable")
        places = [np.unravel_index(int(at), self.shape) for at in order]
        return [self._record(at) for at in places if np.isfinite(effects[at])][:n]

    def frame(self) -> pandas.DataFrame:
        """One row a place. Raises ImportError if pandas is not installed (extra: frame)."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "PatchTable.frame() needs pandas, which is not installed: "
                "pip install 'headwise[frame]'"
            ) from error
        return pandas.DataFrame([self._record(at) for at in np.ndindex(*self.shape)])

    def rank_correlation(self, other: PatchTable) -> float:
        """Spearman's correlation of two tables' effects over all places: how well an estimate
        orders them. Raises ValueError for tables of other places."""
        if self.shape != other.shape or self.site != other.site:
            raise ValueError(
                f"{self.site} {self.shape} and {other.site} {other.shape}: expected two tables of "
                "the same places"
            )
        return rank_correlation(self.effects, other.effects)

    def record(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        numbers = ("examples", "clean", "corrupted", "values", "errors", "normalised")
        told = {name: _listed(getattr(self, name)) for name in numbers}
        facts = ("site", "metric", "unit", "direction", "method", "provenance")
        axes = {name: list(labels) for name, labels in self.axes.items()}
        return {name: getattr(self, name) for name in facts} | {"axes": axes} | told

    def __repr__(self) -> str:
        places = " x ".join(f"{len(labels)} {name}s" for name, labels in self.axes.items())
        best = ", ".join(
            f"{' '.join(str(one[name]) for name in self.axes)}: {one['normalised']:.2f}"
            for one in self.top(3)
        )
        return (
            f"PatchTable({self.site}, {places}, {len(self.clean)} examples, {self.metric}: clean "
            f"{self.clean.mean():.3f}, corrupted {self.corrupted.mean():.3f}; most: {best})"
        )

    def _record(self, at: tuple[Any, ...]) -> dict[str, Any]:
        labels = {name: self.axes[name][i] for name, i in zip(self.axes, at, strict=True)}
        return labels | {
            "index": tuple(int(i) for i in at),
            "value": float(self.values[at]),
            "error": float(self.errors[at]),
            "normalised": float(self.normalised[at]),
            "effect": float(self.effects[at]),
        }


def _error(values: np.ndarray) -> np.ndarray:
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    found: np.ndarray = values.std(0, ddof=1) / np.sqrt(len(values))
    return found


def _listed(values: np.ndarray) -> Any:
    """Nested lists, None for what is no number."""
    listed: Any = values.tolist()
    return _known(listed)


def _known(value: Any) -> Any:
    if isinstance(value, list):
        return [_known(one) for one in value]
    return value if np.isfinite(value) else None
