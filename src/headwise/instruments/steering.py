"""What steering does: to what it aims at, to what it should leave alone, and to a text's loss."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headwise.edits import swap
from headwise.edits.effects import Figure
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.metrics import metric_of
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.prefix import logits_of

__all__ = ["Measured", "Steered", "steered"]


@dataclass(frozen=True)
class Measured:
    """One metric on some examples, without and with a change; `change` is the difference example
    by example, whose error is smaller than that of the two. Errors are standard errors."""

    metric: str
    examples: int
    before: Figure
    after: Figure
    change: Figure

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.before.mean:.4g} -> {self.after.mean:.4g} "
            f"({self.change.mean:+.4g} ± {self.change.error:.2g}, {self.examples} examples)"
        )


@dataclass(frozen=True)
class Steered:
    """What a change does. record: what was changed. efficacy: on what it aims at. specificity: on
    what should stay; collateral: of a text; None where these were not given."""

    record: list[dict[str, Any]]
    efficacy: Measured
    specificity: Measured | None = None
    collateral: Measured | None = None

    def __str__(self) -> str:
        said = {
            "efficacy": self.efficacy,
            "specificity": self.specificity,
            "collateral": self.collateral,
        }
        return "\n".join(f"{name:12} {found}" for name, found in said.items() if found is not None)


def steered(
    model: nn.Module | ModelView,
    changes: Any,
    aims: tuple[Any, Any],
    keeps: tuple[Any, Any] | None = None,
    text: Any | None = None,
    *,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    batch_size: int = 16,
) -> Steered:
    """Measure a change of a model in force and out of force.

        steered(model, {(3, 1): ScaleTokens(span, 4.0)},
                aims=(prompts, LogitDifference(right, wrong)), keeps=(others, "kl"), text=ids)

    changes: what `headwise.swap` takes, or anything that is in force while it is entered (a `Swap`,
    a `Patch`, registers), again and again. aims, keeps: pairs of inputs, as `headwise.see` takes
    them, and a metric (see `metrics`). text: inputs whose loss is measured.

    Raises what `swap` and `see` raise for changes and inputs that cannot be used.
    """
    look = model_view(model)
    changed = changes if hasattr(changes, "__enter__") else swap(look, changes)
    reading = {
        "tokenizer": tokenizer,
        "processor": processor,
        "tokens": tokens,
        "batch_size": batch_size,
    }
    loss = None if text is None else (text, "loss")
    asked = {"efficacy": aims, "specificity": keeps, "collateral": loss}
    with evaluating(look.model):
        found = {
            name: _measured(look, changed, pair, reading)
            for name, pair in asked.items()
            if pair is not None
        }
    return Steered(list(getattr(changed, "record", [])), **found)


@torch.no_grad()
def _measured(
    look: ModelView,
    changed: AbstractContextManager[Any],
    asked: tuple[Any, Any],
    reading: dict[str, Any],
) -> Measured:
    inputs, given = asked
    metric = metric_of(given)
    before: list[float] = []
    after: list[float] = []
    for batch in read_examples(look.model, inputs, **reading):
        own = metric.of(batch.rows)
        plain = logits_of(look.model(**batch.given))
        with changed:
            other = logits_of(look.model(**batch.given))
        before += _numbers(own.score(plain, batch.inputs, plain))
        after += _numbers(own.score(other, batch.inputs, plain))
    return Measured(
        metric=metric.name,
        examples=len(before),
        before=Figure.of(before),
        after=Figure.of(after),
        change=Figure.of([b - a for a, b in zip(before, after, strict=True)]),
    )


def _numbers(scores: torch.Tensor) -> list[float]:
    return [float(score) for score in scores.double()]
