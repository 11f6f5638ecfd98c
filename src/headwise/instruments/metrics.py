"""What a change is measured by: one number an example, from what the model answers.

    "loss"        nats a predicted token (or class), lower is better
    "accuracy"    share of tokens (or classes) predicted right
    "kl"          KL(unchanged || changed) in nats, mean over the predicted positions
    LogitDifference(right, wrong)   logit of the right answer minus that of the wrong one

Anything that is called with (logits, inputs) and gives `(batch,)` numbers serves as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Accuracy",
    "Called",
    "Divergence",
    "LogitDifference",
    "Loss",
    "Metric",
    "last_positions",
    "metric_of",
    "rows_at",
]

Inputs = Mapping[str, Any]


class Metric:
    """One number an example. `name` is what tables and axes call it; `unit` as in `Column`;
    `better`: "lower" or "higher", or "" where neither is."""

    name: str = ""
    unit: str = "score"
    better: str = ""
    needs_clean: bool = False
    """Whether `clean` must be given to `score`."""

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        """logits `(batch, n, vocabulary)`, or `(batch, classes)`; inputs: what the model was called
        with, the same rows; clean: the logits of the unchanged model. Gives `(batch,)`; passes
        gradients."""
        raise NotImplementedError

    def of(self, rows: slice) -> Metric:
        """The metric of these examples alone, for one that holds something for each."""
        return self


class Loss(Metric):
    """Cross-entropy in nats: of `labels` where inputs have them (-100 is ignored), else of the next
    token, mean over an example's predicted positions."""

    name, unit, better = "loss", "nats", "lower"

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        rows, targets, asked = _predicted(logits, inputs)
        losses = F.cross_entropy(
            rows.float().flatten(0, -2), targets.clamp_min(0).flatten(), reduction="none"
        )
        return _mean(losses.view(targets.shape), asked)


class Accuracy(Metric):
    """Share of predicted positions at which the largest logit is right. Has no gradient."""

    name, unit, better = "accuracy", "share", "higher"

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        rows, targets, asked = _predicted(logits, inputs)
        return _mean((rows.argmax(-1) == targets).float(), asked)


class Divergence(Metric):
    """KL(unchanged || changed) in nats, mean over the positions that are predicted (all of those
    that are no padding)."""

    name, unit, better, needs_clean = "kl", "nats", "lower", True

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        if clean is None:
            raise ValueError("KL compares with the unchanged model: give its logits as clean=")
        now, before = logits.float().log_softmax(-1), clean.float().log_softmax(-1)
        found = (before.exp() * (before - now)).sum(-1)
        if found.dim() == 1:
            return found
        mask = inputs.get("attention_mask")
        asked = torch.ones_like(found) if mask is None or mask.shape != found.shape else mask
        return _mean(found, asked)


@dataclass(frozen=True, eq=False)
class LogitDifference(Metric):
    """Logit of `right` minus that of `wrong` at position `at` (counted from the
    end of the real tokens where it is negative).

    right, wrong: token (or class) ids `(examples,)`, one for each example of the inputs, or one for
    all; `(examples, k)` stand for the mean over k of them. at: one position for all, or
    `(examples,)`. Raises ValueError where the numbers of examples do not fit.
    """

    right: Tensor | int
    wrong: Tensor | int
    at: Tensor | int = -1

    name, unit, better = "logit difference", "logits", "higher"

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        batch = len(logits)
        rows = logits if logits.dim() == 2 else rows_at(logits, inputs, self.at)
        return self._logit(rows, self.right, batch) - self._logit(rows, self.wrong, batch)

    def of(self, rows: slice) -> LogitDifference:
        def some(held: Tensor | int) -> Tensor | int:
            return held[rows] if isinstance(held, Tensor) and held.dim() else held

        return LogitDifference(some(self.right), some(self.wrong), some(self.at))

    def _logit(self, rows: Tensor, asked: Tensor | int, batch: int) -> Tensor:
        ids = torch.as_tensor(asked, device=rows.device)
        if ids.dim() == 0:
            return rows[:, ids]
        if batch % len(ids):
            raise ValueError(
                f"LogitDifference has answers for {len(ids)} examples, there are {batch}"
            )
        ids = ids.repeat(batch // len(ids), *[1] * (ids.dim() - 1))  # copies of the same examples
        found = rows.gather(1, ids.view(batch, -1))
        return found.mean(1)


@dataclass(frozen=True, eq=False)
class Called(Metric):
    """A function of (logits, inputs) that gives `(batch,)` numbers."""

    function: Callable[[Tensor, Inputs], Tensor]

    @property
    def name(self) -> str:  # type: ignore[override]
        return getattr(self.function, "__name__", "metric").strip("<>")

    def score(self, logits: Tensor, inputs: Inputs, clean: Tensor | None = None) -> Tensor:
        found = self.function(logits, inputs)
        if found.shape != (len(logits),):
            raise ValueError(
                f"the metric {self.name} gave {tuple(found.shape)} for {len(logits)} examples; "
                f"expected one number each, ({len(logits)},)"
            )
        return found


_NAMED: dict[str, type[Metric]] = {"loss": Loss, "accuracy": Accuracy, "kl": Divergence}


def metric_of(given: Any) -> Metric:
    """What a user gives as a metric: a name, a Metric, or a function of (logits, inputs).

    Raises ValueError for a name that is not known, TypeError for anything else.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        if given not in _NAMED:
            raise ValueError(
                f"no metric {given!r}; there are {', '.join(_NAMED)}, LogitDifference(...), or a "
                "function of (logits, inputs) that gives one number an example"
            )
        return _NAMED[given]()
    if callable(given) and not isinstance(given, type):
        return Called(given)
    raise TypeError(
        f"{given!r} is no metric; expected {', '.join(map(repr, _NAMED))}, a Metric, or a function "
        "of (logits, inputs)"
    )


def last_positions(inputs: Inputs, n: int, batch: int) -> Tensor:
    """`(batch,)`: the position of the last real token, by `attention_mask`; of an encoder-decoder,
    whose answers are the decoder's, by `decoder_attention_mask`."""
    decodes = any(name.startswith("decoder_input") for name in inputs)
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.full((batch,), n - 1)
    places = torch.arange(n, device=mask.device)
    return (mask.bool() * places).amax(1)


def rows_at(logits: Tensor, inputs: Inputs, at: Tensor | int) -> Tensor:
    """`(batch, vocabulary)`: the logits at one position of each example, see LogitDifference."""
    batch, n = logits.shape[:2]
    where = torch.as_tensor(at, device=logits.device)
    if where.dim() and batch % len(where):
        raise ValueError(f"positions for {len(where)} examples, there are {batch}")
    where = where.repeat(batch // len(where)) if where.dim() else where.expand(batch)
    last = last_positions(inputs, n, batch).to(logits.device)
    where = torch.where(where < 0, last + 1 + where, where)
    if bool(((where < 0) | (where >= n)).any()):
        raise ValueError(f"position {at} is outside of the {n} tokens of an example")
    return logits[torch.arange(batch, device=logits.device), where]


def _predicted(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets, and which of them count (as numbers)."""
    labels = inputs.get("labels")
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if logits.dim() == 2:
        if labels is None or labels.dim() != 1:
            raise ValueError(
                "the model gives one answer an example: give its class as labels (batch,) among "
                "the inputs, or another metric"
            )
        asked = labels >= 0
        return logits[:, None], labels[:, None], asked[:, None].float()
    if labels is None:
        if ids is None:
            raise ValueError(
                "without token ids there is no next token to predict: give labels among the "
                "inputs, or another metric"
            )
        labels = ids
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == ids.shape and "decoder_input_ids" not in inputs:
            labels = torch.where(mask.bool(), ids, -100)
    targets = labels[:, 1:]
    if targets.shape[1] == 0:
        raise ValueError("one token has no next one to predict; give 2 tokens or more")
    return logits[:, :-1], targets, (targets >= 0).float()


def _mean(values: Tensor, asked: Tensor) -> Tensor:
    asked = asked.to(values.dtype)
    return (values * asked).sum(-1) / asked.sum(-1).clamp_min(1)
