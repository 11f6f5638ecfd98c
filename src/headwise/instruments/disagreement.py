"""Where a score of what heads look at and the effect of taking them out do not agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headwise.instruments.atlas import Atlas
from headwise.instruments.effect_ranks import rank_correlation, ranks

__all__ = ["DEFAULT", "Disagreement", "correlational", "disagreement"]

DEFAULT = ("residual_share", "induction_score", "previous_mass", "max_weight", "sink_mass")
"""The score that is set against effects unless another is named: the first that is there."""

HIGH, LOW = 0.75, 0.5
"""Shares of the heads that one must stay above to rank high, below to rank low."""


@dataclass(frozen=True)
class Disagreement:
    """Heads that a score and their effect rank differently.

    column: the score. correlation: Spearman's, of the score with the size of the effect, over
    `heads` heads. over: rows of heads in the upper quarter by the score and the lower half by the
    size of their effect, the worst first; under: the other way, with effects of more than two
    standard errors.
    """

    column: str
    correlation: float
    heads: int
    over: tuple[int, ...]
    under: tuple[int, ...]

    def sentences(self, atlas: Atlas, name: str | None = None, most: int = 1) -> list[str]:
        """The first heads of either sort in plain words. name: what the score is called."""
        name = name or self.column.replace("_", " ")
        score = _places(atlas.heads[self.column])
        effect = _places(np.abs(atlas.heads["effect"]))
        metric = (atlas.provenance.get("cause") or {}).get("metric", "metric")
        metric = {"kl": "divergence"}.get(metric, metric)
        said = []
        for row in self.over[:most]:
            said.append(
                f"{atlas.name(row)} is number {score[row]} of {self.heads} by {name}, but without "
                f"it the {metric} changes by {_effect(atlas, row)} only (number {effect[row]})."
            )
        for row in self.under[:most]:
            said.append(
                f"{atlas.name(row)} is number {score[row]} by {name}, yet without it the {metric} "
                f"changes by {_effect(atlas, row)} (number {effect[row]})."
            )
        return said


def correlational(atlas: Atlas) -> list[str]:
    """Columns that can be set against effects: numbers of heads that vary and are no effect."""
    found = []
    for name, values in atlas.heads.items():
        column = atlas.columns.get(name)
        if values.dtype.kind != "f" or name.startswith("effect"):
            continue
        if column is not None and column.unit == "index":
            continue
        known = values[~np.isnan(values)]
        if len(known) > 2 and known.min() < known.max():
            found.append(name)
    return found


def disagreement(atlas: Atlas, column: str | None = None, most: int = 5) -> Disagreement | None:
    """The heads on which a score and the column `effect` disagree; None where there is no score.

    Raises KeyError for an atlas without effects, or without the column.
    """
    if "effect" not in atlas.heads:
        raise KeyError("this atlas has no effects: see headwise.instruments.ablation")
    there = correlational(atlas)
    if column is None:
        column = next((name for name in (*DEFAULT, *there) if name in there), None)
        if column is None:
            return None
    if column not in atlas.heads:
        raise KeyError(f"no head column {column!r}; the atlas has {', '.join(atlas.heads)}")
    score, effect = atlas.heads[column].astype(np.float64), atlas.heads["effect"]
    size = np.abs(effect)
    rows = np.flatnonzero(~(np.isnan(score) | np.isnan(effect)))
    if len(rows) < 3:
        return Disagreement(column, float("nan"), len(rows), (), ())
    by_score, by_effect = (ranks(values[rows]) / len(rows) for values in (score, size))
    gap = by_score - by_effect
    error = atlas.spread.get("effect", np.full(len(atlas), np.nan))[rows]
    sure = ~(size[rows] <= 2 * error)  # one example has no error, and is believed
    over = (by_score > HIGH) & (by_effect <= LOW)
    under = (by_effect > HIGH) & (by_score <= LOW) & sure
    order = np.argsort(-np.abs(gap), kind="stable")
    return Disagreement(
        column,
        rank_correlation(score, size),
        len(rows),
        tuple(int(rows[k]) for k in order if over[k])[:most],
        tuple(int(rows[k]) for k in order if under[k])[:most],
    )


def _places(values: np.ndarray) -> list[int]:
    """1 for the largest; equal ones share a place; NaN is behind all."""
    known = np.sort(values[~np.isnan(values)])
    return [1 + int((known > value).sum()) for value in values]


def _effect(atlas: Atlas, row: int) -> str:
    error = float(atlas.spread.get("effect", np.full(len(atlas), np.nan))[row])
    value = float(atlas.heads["effect"][row])
    if np.isnan(error) or error <= 0:
        return f"{value:+.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))  # two of the error's
    return f"{value:+.{digits}f} ± {error:.{digits}f}"
