"""What stands in the place of parts that are taken out, from the examples that it is made of."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.instruments.ablated_parts import Part
from headwise.instruments.examples import Examples
from headwise.instruments.metrics import metric_of
from headwise.instruments.part_effects import Measurement, values_of
from headwise.instruments.replacements import Mean, Replacement, Resample, Uniform, Zero
from headwise.models import ModelView

__all__ = ["replacement_of"]


def replacement_of(
    view: ModelView,
    parts: Sequence[Part],
    how: str,
    pool: Sequence[Examples],
    by_position: bool = False,
    draws: int = 4,
    seed: int = 0,
    other: bool = False,
) -> Replacement:
    """What stands in the place of these parts. pool: the reference examples; other: whether they
    are others than those that are measured."""
    if how == "zero":
        return Zero()
    if how == "uniform":
        return Uniform(view)
    if how == "resample" and not other:
        return Resample(draws, seed)
    look = Measurement(view, parts, metric_of("kl"), Zero())
    mean = Mean(view, by_position)
    known = []
    for batch in pool:
        values = values_of(look.clean(batch).values, look.sites)
        if how == "resample":
            known.append(values)
        else:
            mean.add(batch.inputs, values)
    return Resample(draws, seed, known) if how == "resample" else mean
