"""What probes found at every site, beside their controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.instruments.atlas import Atlas
from headwise.instruments.columns import Column

if TYPE_CHECKING:
    import pandas

__all__ = ["Probe"]


@dataclass(eq=False, repr=False)
class Probe:
    """Scores of one probe at each place (a layer's site, or a head of it).

    names, layer, head `(places,)`: head is -1 where a place is a whole layer. score, error
    `(places,)`: mean and standard error over folds (folds share training rows, so it is a lower
    bound). folds `(places, folds)`. controls: name -> the same three for shuffled labels, the
    control task, the untrained model. metric: "accuracy", or "r2" for numbers. chance: accuracy of
    the most frequent class (0 for r2). probes: fitted on all rows, where they were asked for.
    reasons: why a control is not there. provenance: with `bytes`, what the activations took.
    """

    site: str
    names: list[str]
    layer: np.ndarray
    head: np.ndarray
    folds: np.ndarray
    controls: dict[str, np.ndarray]
    metric: str
    chance: float
    probes: list[Any] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> np.ndarray:
        return np.asarray(self.folds.mean(1))

    @property
    def error(self) -> np.ndarray:
        return _error(self.folds)

    @property
    def selectivity(self) -> np.ndarray:
        """Score minus that on the control task (Hewitt and Liang 2019), NaN where there is none."""
        if "task" not in self.controls:
            return np.full(len(self.folds), np.nan)
        return np.asarray(self.score - self.controls["task"].mean(1))

    def best(self) -> int:
        """The place with the highest score."""
        return int(self.score.argmax())

    def atlas(self) -> Atlas:
        """Heads with `probe_score`, and `probe_selectivity` where it is known. Raises ValueError
        for places that are no heads."""
        if (self.head < 0).any():
            raise ValueError(f"site {self.site!r} has no heads; probe with site='heads'")
        heads = {"layer": self.layer, "head": self.head, "probe_score": self.score}
        if "task" in self.controls:
            heads["probe_selectivity"] = self.selectivity
        about = f"{self.metric} of a linear probe on the head's output"
        columns = {
            "probe_score": Column("probe_score", "share", f"Held-out {about}.", _SOURCE),
            "probe_selectivity": Column(
                "probe_selectivity", "share", f"{about}, minus that on a control task.", _SOURCE
            ),
        }
        return Atlas(
            heads=heads,
            columns={name: column for name, column in columns.items() if name in heads},
            spread={"probe_score": self.error},
            provenance=self.provenance,
        )

    def frame(self) -> pandas.DataFrame:
        """One line a place. Raises ImportError if pandas is not installed (extra: frame)."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Probe.frame() needs pandas, which is not installed: pip install 'headwise[frame]'"
            ) from error
        table: dict[str, Any] = {
            "name": self.names,
            "layer": self.layer,
            "head": self.head,
            self.metric: self.score,
            "error": self.error,
        }
        for name, folds in self.controls.items():
            table[name] = folds.mean(1)
        return pandas.DataFrame(table)

    def __repr__(self) -> str:
        width = max(map(len, self.names))
        controls = "".join(f"{name:>12}" for name in self.controls)
        lines = [f"{'':<{width}}  {self.metric:>8}   error{controls}   chance {self.chance:.3f}"]
        for n, name in enumerate(self.names):
            beside = "".join(f"{folds[n].mean():12.3f}" for folds in self.controls.values())
            lines.append(f"{name:<{width}}  {self.score[n]:8.3f}  {self.error[n]:6.3f}{beside}")
        lines += [f"no {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


_SOURCE = "Hewitt and Liang 2019, arXiv 1909.03368"


def _error(folds: np.ndarray) -> np.ndarray:
    if folds.shape[1] < 2:
        return np.full(len(folds), np.nan)
    return np.asarray(folds.std(1, ddof=1) / np.sqrt(folds.shape[1]))
