"""`ablate_tokens`: what a model loses without each position."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.clean_run import CleanRun, Start
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.hiding import hidden
from headwise.instruments.metrics import metric_of
from headwise.instruments.part_effects import Measurement, copies_that_fit
from headwise.instruments.replacements import Mean, Zero, real_tokens
from headwise.instruments.run import evaluating
from headwise.models import ModelView, Site

__all__ = ["TOKENS", "TokenEffects", "ablate_tokens"]

TOKENS = ("hide", "zero", "mean")


@dataclass(frozen=True, eq=False)
class TokenEffects:
    """Effects of positions.

    effects: `(examples, n)`, metric of the changed model minus that of the unchanged one; NaN at
    padding and past the end of shorter examples. unchanged: `(examples,)`. ids: token ids
    `(examples, n)`, -1 where there are none, or empty for models without tokens.
    """

    effects: np.ndarray
    unchanged: np.ndarray
    ids: np.ndarray
    metric: str
    how: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> np.ndarray:
        """`(n,)`: mean over the examples that have this position; NaN where none has."""
        known = ~np.isnan(self.effects)
        total = np.where(known, self.effects, 0).sum(0)
        return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)

    def top(self, example: int = 0, n: int = 10) -> list[tuple[int, float]]:
        """The positions of an example whose loss changes the metric most, with their effects."""
        values = self.effects[example]
        order = np.argsort(-np.abs(np.where(np.isnan(values), 0, values)), kind="stable")
        return [(int(p), float(values[p])) for p in order[:n] if not np.isnan(values[p])]


def ablate_tokens(
    model: nn.Module | ModelView,
    inputs: Any,
    metric: Any = "loss",
    how: str = "hide",
    *,
    layer: int = 0,
    stack: str | None = None,
    reference: Any | None = None,
    batch_size: int = 16,
    copies: int | None = None,
    tokens: int | None = None,
    windows: int | None = 1,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    progress: Callable[[int, int, str], Any] | Any | None = None,
) -> TokenEffects:
    """The effect of taking out each position of each example, one at a time.

    how: "hide", nobody attends to it, in any layer (what it computes by itself stays: its own
    prediction counts in the loss); "zero" and "mean", the residual that layer `layer` reads is
    nothing there, or the mean of `reference` (by default the inputs). stack: whose positions, where
    the model has several, by default the first. Inputs and metric as in `ablation`.

    Raises ValueError for what cannot be asked, UnsupportedModelError where "hide" cannot write the
    masks of a model.
    """
    view = model_view(model)
    if how not in TOKENS:
        raise ValueError(f"how={how!r}: expected one of {', '.join(TOKENS)}")
    if copies is not None and copies < 1:
        raise ValueError(f"copies={copies}: expected 1 or more")
    if stack is not None and stack not in view.stacks:
        raise ValueError(f"stack={stack!r}: the model has {', '.join(view.stacks)}")
    measure = metric_of(metric)
    stack = stack or view.stacks[0]
    site = Site("residual", layer, stack if len(view.stacks) > 1 else None)
    batches = read_examples(view.model, inputs, tokenizer, processor, tokens, windows, batch_size)
    pool = batches
    if reference is not None:
        pool = read_examples(
            view.model, reference, tokenizer, processor, tokens, windows, batch_size
        )
    tell = getattr(progress, "step", progress)
    with evaluating(view.model):
        mean = Mean(view)
        run = Measurement(view, [], measure, Zero())
        for batch in pool if how == "mean" else ():
            mean.add(batch.inputs, {site: run.clean(batch, [site]).values[site]})
        tables, unchanged = [], []
        for number, batch in enumerate(batches):
            clean = run.clean(batch, [site])
            unchanged.append(run.base(batch, clean).cpu().numpy())
            made = mean.of(batch, clean.values, 0)[site] if how == "mean" else torch.zeros(())
            tables.append(_positions(run, batch, clean, site, stack, how, made, copies))
            if tell is not None:
                tell(number + 1, len(batches), f"examples to {batch.rows.stop}")
    ids = [_ids(batch, stack == view.stacks[0]) for batch in batches]
    return TokenEffects(
        _stacked(tables, np.nan),
        np.concatenate(unchanged),
        _stacked([one for one in ids if one is not None], -1),
        measure.name,
        how,
        {"layer": layer, "stack": stack} if how != "hide" else {"stack": stack},
    )


def _positions(
    run: Measurement,
    batch: Examples,
    clean: CleanRun,
    site: Site,
    stack: str,
    how: str,
    made: Tensor,
    copies: int | None,
) -> np.ndarray:
    """`(examples, n)`"""
    there = clean.values[site]
    count, n = there.shape[:2]
    before = run.base(batch, clean)
    found = torch.full((count, n), torch.nan, dtype=torch.float64)
    most = min(n, copies or copies_that_fit(run.view, batch, clean.output))
    size = math.ceil(n / math.ceil(n / most))
    for first in range(0, n, size):
        places = torch.arange(first, min(n, first + size))
        start = clean.start_of([site]) if how != "hide" else Start(0)
        keys = torch.nn.functional.one_hot(places, n).bool().repeat_interleave(count, 0)
        with torch.no_grad(), hidden(run.view, stack, keys) if how == "hide" else nullcontext():
            writes = {} if how == "hide" else {site: _writing(keys, made)}
            logits = clean.run(writes, len(places), start)
            after = run.scores(batch, logits, clean.output).double()
        found[:, first : first + len(places)] = (after - before).T.cpu()
    real = real_tokens(run.view, site, batch.inputs, found.shape).cpu()
    return np.asarray(found.masked_fill(~real, torch.nan).numpy())


def _writing(keys: Tensor, made: Tensor) -> Callable[[Tensor], Tensor]:
    def write(there: Tensor) -> Tensor:
        new = made.to(there).expand_as(there)
        return torch.where(keys.to(there.device)[..., None], new, there)

    return write


def _ids(batch: Examples, first: bool) -> np.ndarray | None:
    inputs: Mapping[str, Tensor] = batch.inputs
    ids = inputs.get("input_ids" if first else "decoder_input_ids")
    return None if ids is None else np.asarray(ids.cpu().numpy())


def _stacked(tables: list[np.ndarray], empty: float) -> np.ndarray:
    """Tables of different lengths under each other."""
    if not tables:
        return np.empty((0, 0))
    n = max(table.shape[1] for table in tables)
    wide = [
        np.pad(table, ((0, 0), (0, n - table.shape[1])), constant_values=empty) for table in tables
    ]
    return np.concatenate(wide)
