"""What an edit of facts did: to the fact, to other wordings of it, to its neighbours, to a text.

Efficacy, paraphrase and neighbourhood scores are those of Meng et al. 2022, arXiv 2202.05262,
section 3.4 (here on likeliest tokens, not on which of two is likelier); the loss on a text is what
everybody else pays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from headwise.edits.at_rest import at_rest, device_of
from headwise.edits.fact_prompts import (
    Fact,
    Ids,
    Rows,
    Wording,
    encode,
    read_target,
    read_wording,
    require_tokenizer,
    rows_of,
    target_logs,
)
from headwise.edits.patch_file import Patch
from headwise.models.prefix import logits_of

Line: TypeAlias = "str | Ids"


@dataclass(frozen=True)
class Said:
    """How some prompts were answered, before the edit and after it.

    asked: how many. right_before, right_after: share whose likeliest answer is the target, token
    by token. probability_before, probability_after: of the target, a geometric mean.
    """

    asked: int
    right_before: float
    right_after: float
    probability_before: float
    probability_after: float


@dataclass(frozen=True)
class Kept:
    """Prompts that are to be answered as before. same: share whose likeliest next token is the
    same. divergence: KL(before || after) of the next token, nats, mean over prompts."""

    asked: int
    same: float
    divergence: float


@dataclass(frozen=True)
class Loss:
    """Nats per token of a text. change_error: standard error of the change over windows, NaN for
    one window."""

    tokens: int
    windows: int
    before: float
    after: float
    change: float
    change_error: float


@dataclass(frozen=True)
class EditEffects:
    """What was measured; None for what was not asked."""

    efficacy: Said
    paraphrases: Said | None = None
    neighbours: Kept | None = None
    loss: Loss | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON; what is not a number becomes null."""
        found: dict[str, Any] = {}
        for name in ("efficacy", "paraphrases", "neighbours", "loss"):
            part = getattr(self, name)
            if part is not None:
                found[name] = {
                    key: None if isinstance(value, float) and math.isnan(value) else value
                    for key, value in vars(part).items()
                }
        return found

    def __str__(self) -> str:
        lines = [_said("the fact itself", self.efficacy)]
        if self.paraphrases is not None:
            lines.append(_said("other wordings", self.paraphrases))
        if self.neighbours is not None:
            kept = self.neighbours
            lines.append(
                f"neighbours       {kept.same:.0%} of {kept.asked} answered as before, KL "
                f"{kept.divergence:.4f} nats"
            )
        if self.loss is not None:
            loss = self.loss
            error = "" if math.isnan(loss.change_error) else f" +/- {loss.change_error:.4f}"
            lines.append(
                f"loss on text     {loss.before:.4f} -> {loss.after:.4f} nats per token, "
                f"{loss.change:+.4f}{error} ({loss.tokens:,} tokens)"
            )
        return "\n".join(lines)


@torch.no_grad()
def measure_edit(
    patch: Patch,
    tokenizer: Any | None = None,
    *,
    paraphrases: Sequence[Line] = (),
    neighbours: Sequence[Line] = (),
    text: str | Tensor | Sequence[Any] | None = None,
    window: int = 256,
    most: int | None = 4096,
) -> EditEffects:
    """Measure a patch of `edit_fact` on its model, and write what was measured into its record.

    paraphrases: other prompts of the first fact, answered with its target. neighbours: prompts
    about other things. text: what the loss is measured on, `(n,)` ids or text, in windows of so
    many tokens, at most `most` in all. The model is as before afterwards: the patch in force or
    not, other patches as they were.

    Raises ValueError for a patch that belongs to no model, or whose record states no fact, and for
    prompts without tokens.
    """
    if patch.model is None:
        raise ValueError("this patch belongs to no model yet: measure patch.on(model)")
    requests = patch.record.get("request")
    if not requests:
        raise ValueError("the patch's record has no request, so there is no fact to ask for")
    model = patch.model
    facts = [Fact(one["prompt"], _place(one["subject"]), one["target"]) for one in requests]
    asked = [
        (
            read_wording(fact.prompt, fact.subject, tokenizer),
            read_target(fact.prompt, fact.target, tokenizer),
        )
        for fact in facts
    ]
    reworded = [
        (_line(one, tokenizer), read_target(one, facts[0].target, tokenizer)) for one in paraphrases
    ]
    others = [_line(one, tokenizer) for one in neighbours]
    windows = _windows(text, tokenizer, window, most)

    def measure() -> tuple[list[tuple[bool, float]], list[Tensor], list[float]]:
        answers = [_asked(model, line, target) for line, target in [*asked, *reworded]]
        return answers, [_next(model, line) for line in others], [_loss(model, w) for w in windows]

    was_on = patch.applied
    if was_on:
        patch.undo()
    try:
        with at_rest(model):
            before = measure()
            with patch:
                after = measure()
    finally:
        if was_on:
            patch.apply()
    own = len(asked)
    found = EditEffects(
        _compared(before[0][:own], after[0][:own]),
        _compared(before[0][own:], after[0][own:]) if reworded else None,
        _kept(before[1], after[1]) if others else None,
        _losses(before[2], after[2], windows) if windows else None,
    )
    patch.record["effects"] = found.as_dict()
    return found


def _place(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


def _line(given: Line, tokenizer: Any | None) -> Wording:
    if isinstance(given, str):
        return read_wording(given, given, tokenizer)
    return read_wording(given, len(given) - 1, tokenizer)


def _logits(model: nn.Module, rows: Rows) -> Tensor:
    return logits_of(model(input_ids=rows.inputs.to(device_of(model))))


def _asked(model: nn.Module, line: Wording, target: Tensor) -> tuple[bool, float]:
    """(whether the target is the likeliest answer, its mean log-probability per token)"""
    rows = rows_of([line], target)
    logits = _logits(model, rows)
    end = int(rows.ends[0])
    best = logits[0, end : end + len(target)].argmax(-1).cpu()
    return bool((best == target).all()), float(target_logs(logits, rows, target).mean())


def _next(model: nn.Module, line: Wording) -> Tensor:
    return _logits(model, rows_of([line]))[0, -1].float().log_softmax(-1).cpu()


def _loss(model: nn.Module, ids: Tensor) -> float:
    logits = logits_of(model(input_ids=ids[None].to(device_of(model))))[0, :-1].float()
    return float(nn.functional.cross_entropy(logits, ids[1:].to(logits.device)))


def _compared(before: list[tuple[bool, float]], after: list[tuple[bool, float]]) -> Said:
    n = len(before)
    return Said(
        n,
        sum(right for right, _ in before) / n,
        sum(right for right, _ in after) / n,
        math.exp(sum(logs for _, logs in before) / n),
        math.exp(sum(logs for _, logs in after) / n),
    )


def _kept(before: list[Tensor], after: list[Tensor]) -> Kept:
    n = len(before)
    pairs = list(zip(before, after, strict=True))
    same = sum(float(a.argmax() == b.argmax()) for a, b in pairs) / n
    drift = sum(float((a.exp() * (a - b)).nan_to_num(0.0).sum()) for a, b in pairs) / n
    return Kept(n, same, drift)


def _losses(before: list[float], after: list[float], windows: list[Tensor]) -> Loss:
    """Means over the windows, weighted by their tokens; the error of the change over windows."""
    weights = torch.tensor([float(len(ids) - 1) for ids in windows], dtype=torch.float64)
    weights = weights / weights.sum()
    a = torch.tensor(before, dtype=torch.float64)
    b = torch.tensor(after, dtype=torch.float64)
    n = len(windows)
    error = float((b - a).std() / n**0.5) if n > 1 else math.nan
    first, second = float(weights @ a), float(weights @ b)
    return Loss(sum(map(len, windows)), n, first, second, second - first, error)


def _windows(text: Any, tokenizer: Any | None, window: int, most: int | None) -> list[Tensor]:
    if text is None:
        return []
    given = [text] if isinstance(text, str | Tensor) else list(text)
    found: list[Tensor] = []
    left = most if most is not None else 1 << 62
    for one in given:
        if isinstance(one, str):
            require_tokenizer(tokenizer)
            lines = [torch.tensor(encode(tokenizer, one), dtype=torch.long)]
        else:
            ids = torch.as_tensor(one).detach().cpu().long()
            lines = list(ids) if ids.dim() == 2 else [ids]
        for line in lines:
            for piece in line[:left].split(window):
                if len(piece) > 1:
                    found.append(piece)
                    left -= len(piece)
    if not found:
        raise ValueError("text= holds no two tokens to measure the loss on")
    return found


def _said(what: str, said: Said) -> str:
    count = f"{said.right_before:.0%} -> {said.right_after:.0%} of {said.asked}"
    odds = f"{said.probability_before:.3g} -> {said.probability_after:.3g}"
    return f"{what:<17}{count} answered with the target, its probability {odds}"
