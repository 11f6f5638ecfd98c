"""What an attribution explains: one number an example, in words and as a metric.

None                       the logit of what the model predicts: its class, or the token at the
                           last position
an id, or `(examples,)`    the logit of this class, or of this token at the last position
LogitDifference, "loss"    any metric that has a gradient where the model stands
a function                 of (logits, inputs) that gives `(batch,)`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.instruments.metrics import Inputs, LogitDifference, Metric, metric_of, rows_at
from headwise.models import ModelView
from headwise.models.prefix import logits_of

__all__ = ["LogitOf", "ProbabilityOf", "Target", "read_target"]


@dataclass(frozen=True, eq=False)
class LogitOf(Metric):
    """The logit of one class, or of one token at position `at` (counted from the end of the real
    tokens where it is negative).

    ids: one for all, or `(examples,)`; at: one for all, or `(examples,)`. A batch of several
    copies of the examples, copy after copy, is scored as such. Raises ValueError for an id that
    the model has no logit for, and where the numbers of examples do not fit.
    """

    ids: Tensor | int
    at: Tensor | int = -1

    name, unit, better = "logit", "logits", "higher"

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        rows = logits if logits.dim() == 2 else rows_at(logits, inputs, self.at)
        ids = torch.as_tensor(self.ids, device=rows.device)
        if ids.dim() and len(rows) % len(ids):
            raise ValueError(f"target ids for {len(ids)} examples, there are {len(rows)}")
        if bool(((ids < 0) | (ids >= rows.shape[-1])).any()):
            raise ValueError(
                f"target {self.ids}: the model has logits for ids 0 to {rows.shape[-1] - 1}"
            )
        ids = ids.repeat(len(rows) // len(ids)) if ids.dim() else ids.expand(len(rows))
        return rows.gather(1, ids.long()[:, None])[:, 0]

    def of(self, rows: slice) -> LogitOf:
        def some(held: Tensor | int) -> Tensor | int:
            return held[rows] if isinstance(held, Tensor) and held.dim() else held

        return LogitOf(some(self.ids), some(self.at))


@dataclass(frozen=True, eq=False)
class ProbabilityOf(LogitOf):
    """The probability of what `LogitOf` takes the logit of."""

    name, unit = "probability", "share"

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        return super().score(logits.float().log_softmax(-1), inputs).exp()

    def of(self, rows: slice) -> ProbabilityOf:
        one = super().of(rows)
        return ProbabilityOf(one.ids, one.at)


@dataclass(frozen=True, eq=False)
class Target:
    """What was asked for. metric: None where it is what the model predicts, which is known only
    when it has run. words: the same for people."""

    metric: Metric | None
    words: str

    def of(self, view: ModelView, inputs: Inputs, rows: slice) -> Metric:
        """The metric of these examples; runs the model where it must say what it predicts."""
        if self.metric is not None:
            return self.metric.of(rows)
        with torch.no_grad():
            output = view.model(**inputs)
        if hasattr(output, "last_hidden_state") and not hasattr(output, "logits"):
            raise ValueError(
                f"{type(view.model).__name__} gives hidden states and no logits, so it predicts "
                "nothing: give target= a function of (its output, inputs), one number an example"
            )
        logits = logits_of(output)
        if logits.dim() not in (2, 3):
            raise ValueError(
                f"{type(view.model).__name__} answers {tuple(logits.shape)}; a prediction is read "
                "from (batch, classes) or (batch, n, vocabulary): give target= a function"
            )
        rows_ = logits if logits.dim() == 2 else rows_at(logits, inputs, -1)
        return LogitOf(rows_.argmax(-1))


def read_target(given: Any, examples: int) -> Target:
    """What a user gives as target, for so many examples.

    Raises ValueError where the number of ids does not fit, or for a metric that has no gradient
    at the unchanged model; TypeError for what is no target.
    """
    if given is None:
        return Target(None, "the logit of what the model predicts")
    if isinstance(given, bool):
        raise TypeError(f"target={given}: expected a class or token id, a metric or a function")
    numbers = isinstance(given, Sequence) and not isinstance(given, str)
    if isinstance(given, int | Tensor) or numbers or hasattr(given, "__array__"):
        ids = torch.as_tensor(given)
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() > 1:
            raise TypeError(
                f"target ids are {ids.dtype} {tuple(ids.shape)}; expected integers, one for all "
                "examples or (examples,)"
            )
        if ids.dim() and len(ids) not in (1, examples):
            raise ValueError(f"target has {len(ids)} ids for {examples} examples")
        one = ids.numel() == 1
        logit = LogitOf(int(ids.reshape(-1)[0]) if one else ids)
        return Target(logit, f"the logit of {logit.ids}" if one else "the logit of given ids")
    metric = metric_of(given)
    if metric.needs_clean or metric.name == "accuracy":
        raise ValueError(
            f"{metric.name!r} has no gradient at the unchanged model and is nothing to be "
            "attributed; take a logit, LogitDifference(...), 'loss' or a function"
        )
    if isinstance(metric, LogitDifference) and isinstance(metric.right, int):
        return Target(metric, f"the logit of {metric.right} minus that of {metric.wrong}")
    return Target(metric, f"the {metric.name}")
