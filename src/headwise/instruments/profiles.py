"""What each change does to each head by itself: the table from which heads to steer are chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from headwise.edits import swap
from headwise.edits.effects import Figure
from headwise.edits.selectors import select
from headwise.instruments import provenance
from headwise.instruments.atlas import Atlas
from headwise.instruments.columns import Column
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.head_rows import rows_of
from headwise.instruments.metrics import metric_of
from headwise.instruments.run import evaluating
from headwise.models import ModelView, Prefix

__all__ = ["profile"]


def profile(
    model: nn.Module | ModelView,
    inputs: Any,
    metric: Any,
    changes: Mapping[str, Any],
    heads: Any = "all",
    *,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int, str], Any] | None = None,
) -> Atlas:
    """For every head, what each change of it alone does to a metric, as an Atlas.

        table = profile(model, prompts, "loss", {"up": ScaleSink(4.0), "down": ScaleSink(0.25)})
        table.where("up < 0 and down > 0")

    changes: column name -> a change as `headwise.swap` takes it. heads: a selector; the others are
    NaN. A column holds metric(changed) - metric(unchanged), mean over examples, `Atlas.spread` its
    standard error. Layers below the changed one are not computed again.

    Raises ValueError for a column that is no identifier, and what `swap` raises where a change
    cannot be done to a head, before anything is measured.
    """
    look, began = model_view(model), time.perf_counter()
    odd = [name for name in changes if not name.isidentifier()]
    if odd or not changes:
        raise ValueError(f"changes {odd or 'are empty'}: name each as a column is, such as 'up'")
    wanted = metric_of(metric)
    chosen = set(select(look, heads))
    rows = [(a, head) for a in look.attentions for head in range(a.heads)]
    ready = [
        (row, name, swap(look, {(a.stack, a.kind, a.layer, head): change}))
        for row, (a, head) in enumerate(rows)
        if (a, head) in chosen
        for name, change in changes.items()
    ]
    starts = {id(a): _number(look, a) for a in look.attentions}
    found: dict[str, list[list[float]]] = {name: [[] for _ in rows] for name in changes}
    reading = {"tokenizer": tokenizer, "processor": processor, "tokens": tokens}
    batches = read_examples(look.model, inputs, batch_size=batch_size, **reading)
    with evaluating(look.model), torch.no_grad():
        for at, batch in enumerate(batches):
            own, prefix = wanted.of(batch.rows), Prefix(look, batch.inputs)
            before = own.score(prefix.output, batch.inputs, prefix.output).double()
            for done, (row, name, changed) in enumerate(ready):
                with changed:
                    logits = prefix.run({}, start=starts[id(rows[row][0])])
                after = own.score(logits, batch.inputs, prefix.output).double()
                found[name][row] += (after - before).tolist()
                if progress is not None:
                    step = at * len(ready) + done + 1
                    progress(step, len(ready) * len(batches), f"{name}, {changed.record}")
    none = Figure(math.nan, math.nan)
    table = {n: [Figure.of(v) if v else none for v in column] for n, column in found.items()}
    return Atlas(
        heads=rows_of(look)[0] | {n: np.array([f.mean for f in c]) for n, c in table.items()},
        spread={n: np.array([f.error for f in c]) for n, c in table.items()},
        columns={
            name: Column(name, wanted.unit, f"Change of the {wanted.name} by {change!r}.")
            for name, change in changes.items()
        },
        provenance=provenance.collect(
            look.model,
            [],
            time.perf_counter() - began,
            settings={
                "metric": wanted.name,
                "changes": {name: repr(change) for name, change in changes.items()},
                "examples": sum(len(batch) for batch in batches),
            },
        ),
    )


def _number(look: ModelView, attention: Any) -> int:
    """Which layer, in order of execution, an attention is in."""
    return next(n for n, layer in enumerate(look.layers) if attention in layer.attentions)
