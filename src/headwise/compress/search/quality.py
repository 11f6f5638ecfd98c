"""How good a smaller model is, beside the one it was made from, on text that it was not fitted to.

Loss, agreement and divergence are means over windows, with standard errors of the differences
window by window. Whoever wants benchmarks runs lm-evaluation-harness (see docs/shrink.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.instruments.examples import Examples
from headwise.instruments.run import evaluating
from headwise.models.prefix import logits_of

_ROWS = 256  # rows of logits that are compared at a time, to save memory

Answers = Callable[[nn.Module, Examples], Tensor]
"""A model's logits `(batch, n, vocabulary)` (or `(batch, classes)`) on some examples; fewer than n
where only the last positions count."""


@dataclass(frozen=True)
class Quality:
    """Figures of a changed model beside the original, on the same examples.

    loss: nats a predicted token (or class). loss_change: minus the original's; `loss_error` is the
    standard error of its mean over windows, NaN for one. agreement: share of positions at which
    both models would go on with the same token. kl: KL(original || changed) in nats, mean over
    positions.
    """

    loss: float
    loss_change: float
    loss_error: float
    agreement: float
    kl: float
    windows: int

    def as_dict(self) -> dict[str, Any]:
        """The same, None for what is not known: JSON-able."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def plain_answers(model: nn.Module, examples: Examples) -> Tensor:
    """One forward pass."""
    return logits_of(model(**examples.given))


def measure_quality(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Examples],
    answers: Answers = plain_answers,
    known: Callable[[Examples], Tensor] | None = None,
) -> Quality:
    """The changed `model` beside `original`, each window read by itself.

    answers: how the changed model is asked. known: what the original says to a batch, from memory;
    else it is asked by `plain_answers`. Fewer rows than n are the last ones. Labels among
    the inputs are what is predicted where they are given, else the next token. Raises ValueError
    where there is nothing to predict.
    """
    rows: list[tuple[float, float, float, float]] = []
    with torch.no_grad(), evaluating(model), evaluating(original):
        for batch in batches:
            changed = answers(model, batch)
            same = model is original and answers is plain_answers
            said = plain_answers(original, batch) if known is None and not same else changed
            said = said if known is None else known(batch)
            for row in range(len(batch)):
                targets = _targets(batch, row, said)
                a, b = (x[row] if x.dim() == 3 else x[row : row + 1] for x in (said, changed))
                asked = min(len(a), len(b))
                rows.append(_compare(a[-asked:], b[-asked:], targets[-asked:]))
    before, after, agreement, kl = (list(column) for column in zip(*rows, strict=True))
    changes = [b - a for a, b in zip(before, after, strict=True)]
    count = len(rows)
    return Quality(
        statistics.fmean(after),
        statistics.fmean(changes),
        statistics.stdev(changes) / math.sqrt(count) if count > 1 else math.nan,
        statistics.fmean(agreement),
        max(0.0, statistics.fmean(kl)),  # which rounding can take below
        count,
    )


def _targets(batch: Examples, row: int, logits: Tensor) -> Tensor:
    """What is predicted at each row of logits, -100 where nothing is."""
    labels = batch.inputs.get("labels")
    if logits.dim() == 2:
        if labels is None:
            raise ValueError("the model answers with classes: give labels among the inputs")
        return labels[row : row + 1]
    if labels is None:
        labels = batch.inputs.get("input_ids")
        if labels is None:
            raise ValueError("without token ids nothing is predicted: give labels as an input")
        mask = batch.inputs.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            labels = torch.where(mask.bool(), labels, -100)
    return F.pad(labels[row, 1:], (0, 1), value=-100)


def _compare(before: Tensor, after: Tensor, targets: Tensor) -> tuple[float, float, float, float]:
    """(loss, loss of the other, agreement, divergence), means over what is predicted."""
    sums, count = [0.0] * 4, 0
    for start in range(0, len(before), _ROWS):
        asked = targets[start : start + _ROWS]
        used = asked >= 0
        a, b = (x[start : start + _ROWS][used].float().log_softmax(-1) for x in (before, after))
        asked = asked[used]
        count += len(asked)
        for place, logs in enumerate((a, b)):
            sums[place] -= float(logs.gather(1, asked[:, None]).double().sum())
        sums[2] += float((a.argmax(-1) == b.argmax(-1)).sum())
        sums[3] += float((a.exp() * (a - b)).nan_to_num(0.0).double().sum())
    if not count:
        raise ValueError("nothing is predicted in a window: give 2 tokens or more, or labels")
    loss, other, same, kl = (total / count for total in sums)
    return loss, other, same, kl
