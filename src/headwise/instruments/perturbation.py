"""Deletion and insertion: does an answer change with what an attribution says it rests on?

Positions are taken away (put back) in order of their scores, most relevant first, and the answer is
scored at every step. A good order makes the curve of deletion fall early and that of insertion rise
early: the area under it is compared with that of random orders and of the reversed order (Samek et
al. 2017, arXiv 1509.06321; Petsiuk et al. 2018, arXiv 1806.07421; for tokens Chefer et al. 2021,
arXiv 2103.15679). What stands in the place of a token decides how far from real inputs the model
is taken, so it is a choice, and is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.attribution import Attribution
from headwise.instruments.curves import RANDOM, Curves
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.hiding import hidden
from headwise.instruments.input_places import InputPlace, scored
from headwise.instruments.kept_maps import keep
from headwise.instruments.metrics import Metric
from headwise.instruments.run import evaluating
from headwise.instruments.targets import LogitOf, ProbabilityOf, read_target
from headwise.models import ModelView

__all__ = ["perturb"]

MODES = ("deletion", "insertion")


def perturb(
    model: nn.Module | ModelView,
    inputs: Any,
    scores: Attribution | Mapping[str, Attribution],
    target: Any = None,
    *,
    mode: str = "deletion",
    instead: str | int | Tensor = "mean",
    at: str | None = None,
    of: str | None = None,
    spare: Sequence[int] | None = None,
    steps: int = 10,
    orders: int = 5,
    seed: int = 0,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    rows: int = 256,
) -> Curves:
    """Curves of an answer while positions are deleted, or inserted, by one or several attributions
    of the same inputs.

    target: as in `attribute`; a logit is scored as its probability. instead: what takes the place
    of a position: "mean" (of what stands there, over all positions of the batch), "zero", a token
    id (padding, mask), a tensor `(width,)`, or "hide" (it stays, but nobody may look at it). at,
    of: where that is written, "tokens" or "residual", and of which stack, as in `InputPlace`.
    spare: positions that always stay (negative ones from the end); None: those that the answer is
    read from, such as a class token. steps: of equal shares of an example's positions; orders:
    random ones, of every example its own; rows: examples that run together.

    The model is left as it was. Raises ValueError for attributions of other inputs and options that
    do not exist, before anything runs.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected {' or '.join(MODES)}")
    if min(steps, orders, rows) < 1:
        raise ValueError(f"steps={steps}, orders={orders}, rows={rows}: expected 1 or more")
    if isinstance(instead, str) and instead not in ("mean", "zero", "hide"):
        raise ValueError(f"instead={instead!r}: expected 'mean', 'zero', 'hide', an id or a tensor")
    view = model_view(model)
    given = {scores.method: scores} if isinstance(scores, Attribution) else dict(scores)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, None, rows)
    asked = read_target(target, batches[-1].rows.stop)
    for name, one in given.items():
        if name == RANDOM:
            raise ValueError(f"{name!r} is what the mean over random orders is called; rename it")
        if len(one) != batches[-1].rows.stop:
            raise ValueError(
                f"{name} scores {len(one)} examples, the inputs are {batches[-1].rows.stop}"
            )
    random = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {}
    drawn: list[Tensor] = []
    with evaluating(view.model):
        for batch in batches:
            metric = asked.of(view, batch.inputs, batch.rows)
            if isinstance(metric, LogitOf):
                metric = ProbabilityOf(metric.ids, metric.at)
            run = _Perturbed(view, batch, metric, instead, InputPlace(view, batch.inputs, at, of))
            stays = run.stays(spare)
            draws = [torch.rand(stays.shape, generator=random) for _ in range(orders)]
            curves = [run.curve(_removed(one, stays, steps), mode, rows) for one in draws]
            drawn.append(torch.stack(curves).mean(0))
            wanted: dict[str, Tensor] = {}
            for name, one in given.items():
                held = _held(name, one, batch, stays)
                wanted |= {name: held, f"{name}, reversed": -held}
            for name, held in wanted.items():
                curve = run.curve(_removed(held, stays, steps), mode, rows)
                found.setdefault(name, []).append(curve)
    whole = {name: np.asarray(torch.cat(curves, 0)) for name, curves in found.items()}
    words = asked.words
    if words.startswith("the logit of what") or isinstance(asked.metric, LogitOf):
        words = words.replace("logit", "probability")
    return Curves(mode, words, np.linspace(0, 1, steps + 1), whole, np.asarray(torch.cat(drawn)))


class _Perturbed:
    """One batch, to be scored with any positions replaced."""

    def __init__(
        self,
        view: ModelView,
        batch: Examples,
        metric: Metric,
        instead: str | int | Tensor,
        place: InputPlace,
    ) -> None:
        self.view, self.batch, self.metric, self.place = view, batch, metric, place
        self.there = place.read()
        name = "decoder_attention_mask" if place.key != "input_ids" else "attention_mask"
        mask = batch.inputs.get(name)
        self.real = torch.ones(self.there.shape[:2], dtype=torch.bool)
        if mask is not None and mask.shape == self.real.shape:
            self.real = mask.bool().cpu()
        self.hides = isinstance(instead, str) and instead == "hide"
        self.other = self.there
        if isinstance(instead, Tensor):
            self.other = instead.to(self.there).expand_as(self.there)
        elif isinstance(instead, int):
            self.other = place.read(token=instead)
        elif instead == "mean":
            self.other = self.there[self.real].mean(0).expand_as(self.there)
        elif instead == "zero":
            self.other = torch.zeros_like(self.there)

    def stays(self, spare: Sequence[int] | None) -> Tensor:
        """`(batch, n)`: padding, and what is never taken away."""
        kept = ~self.real
        n = kept.shape[1]
        if spare is not None:
            last = (self.real * torch.arange(n)).amax(1)
            for one in spare:
                where = torch.full_like(last, one) if one >= 0 else last + 1 + one
                if bool(((where < 0) | (where >= n)).any()):
                    raise ValueError(f"spare={list(spare)}: there are {n} positions")
                kept[torch.arange(len(kept)), where] = True
            return kept
        if self.place.stack == self.view.stacks[-1]:
            _, row = keep(self.view, self.batch.inputs, self.metric)
            read = row.cpu() > 1e-6
            kept = kept | (read & (read.sum(-1, keepdim=True) == 1))  # else all would stay
        return kept

    def curve(self, removed: Tensor, mode: str, rows: int) -> Tensor:
        """Scores `(batch, steps + 1)` with `(steps + 1, batch, n)` positions replaced."""
        count = max(1, rows // len(self.batch))
        if mode == "insertion":  # what is not yet put back
            removed = removed[-1:] & ~removed
        return torch.cat([self._run(part) for part in removed.split(count)]).T.float().cpu()

    def _run(self, removed: Tensor) -> Tensor:
        copies, batch, n = removed.shape
        flat = removed.reshape(copies * batch, n).to(self.there.device)
        points = torch.where(
            flat[..., None], self.other.repeat(copies, 1, 1), self.there.repeat(copies, 1, 1)
        )
        hiding = hidden(self.view, self.place.stack, flat) if self.hides else nullcontext()
        with hiding:
            return scored(self.place, self.metric, points).detach().view(copies, batch)


def _held(name: str, scores: Attribution, batch: Examples, stays: Tensor) -> Tensor:
    """The scores of a batch `(batch, n)`."""
    rows = [torch.as_tensor(scores.scores[i]) for i in range(batch.rows.start, batch.rows.stop)]
    for row in rows:
        if len(row) != stays.shape[1]:
            raise ValueError(
                f"{name} scores {len(row)} positions, and {stays.shape[1]} can be replaced: is it "
                "of these inputs, and of this stack (of=)?"
            )
    return torch.stack(rows).float()


def _removed(scores: Tensor, stays: Tensor, steps: int) -> Tensor:
    """`(steps + 1, batch, n)`: which positions are gone at each step, highest scores first."""
    order = scores.masked_fill(stays, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    shares = torch.arange(steps + 1)[:, None] / steps
    count = (shares * (~stays).sum(-1)).round()
    return rank < count[..., None]
