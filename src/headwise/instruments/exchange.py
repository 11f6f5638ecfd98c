"""Many runs of one model, in each of which some values are exchanged for others, a few at a time.

Each change asks for a run of its own; here several share a pass, as copies of the batch behind
each other, and a pass starts at the first layer that its changes touch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.instruments.metrics import Metric
from headwise.models import ModelView
from headwise.models.prefix import Prefix, logits_of
from headwise.models.sites import Site, Write, recording

__all__ = ["Change", "Exchange", "Scored", "exchanged"]

PASS_TOKENS = 512
"""Tokens that go through the model at once: enough for its matrix products to be busy, few enough
for what they make to stay in a cache."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """Put `source` where a site has its own value.

    `source`: `(batch, n, ...)`, of the site's shape. `head`: only this one, None for all. `at`:
    `(batch,)` one position an example, None for all positions. `add`: add it instead.
    """

    site: Site
    source: Tensor
    head: int | None = None
    at: Tensor | None = None
    add: bool = False

    def write(self, there: Tensor) -> None:
        """Into `there` `(batch, n, ...)`, in place."""
        place: tuple[Any, ...] = (slice(None), slice(None))
        if self.at is not None:
            at = self.at.to(there.device)
            place = (torch.arange(len(there), device=there.device), at)
        if self.head is not None:
            place = (*place, self.head)
        made = self.source[place].to(there)
        there[place] = there[place] + made if self.add else made


Change = Sequence[Exchange]
"""What is exchanged together, in one run."""


class Scored:
    """A model on some inputs with a metric: `of(logits)` gives one number an example.

    Where the metric asks for the last position only (its `at` is -1, as LogitDifference's is), the
    model is asked for the logits there and nowhere else (transformers' `logits_to_keep`), which
    spares most of a large unembedding.

    metric: already cut to these examples (`Metric.of`). `clean`: to be set to the logits that a
    metric such as "kl" compares with.
    """

    def __init__(self, view: ModelView, inputs: Mapping[str, Tensor], metric: Metric) -> None:
        self.view, self.metric = view, metric
        self.inputs: dict[str, Any] = {k: v for k, v in inputs.items() if k != "labels"}
        self.batch = next(v.shape[0] for v in inputs.values() if v.dim())
        self.given: dict[str, Any] = dict(inputs)
        self.clean: Tensor | None = None
        mask = inputs.get("attention_mask")
        whole = mask is None or bool((mask != 0).all())
        last = _is_last(getattr(metric, "at", None))
        known = inspect.signature(view.model.forward).parameters
        if whole and last and "logits_to_keep" in known and "input_ids" in inputs:
            self.inputs["logits_to_keep"] = 1
            self.given.pop("attention_mask", None)

    def prefix(self) -> Prefix:
        """The model's run on these inputs, from which others go on."""
        return Prefix(self.view, self.inputs)

    def recorded(self, sites: Sequence[Site]) -> tuple[dict[Site, Tensor], Tensor]:
        """What is at these sites in a plain run, and its logits; without gradients."""
        more = {}
        if "use_cache" in inspect.signature(self.view.model.forward).parameters:
            more["use_cache"] = False
        with torch.no_grad(), recording(self.view, sites) as kept:
            logits = logits_of(self.view.model(**{**more, **self.inputs}))
        return dict(kept), logits

    def of(self, logits: Tensor) -> Tensor:
        """Logits of several copies `(copies * batch, ...)` -> `(copies, batch)`, float64."""
        scores = [
            self.metric.score(part, self.given, self.clean) for part in logits.split(self.batch)
        ]
        return torch.stack(scores).double()


def _is_last(at: Any) -> bool:
    return isinstance(at, int) and at == -1


def exchanged(
    prefix: Prefix,
    changes: Sequence[Change],
    score: Callable[[Tensor], Tensor],
    length: int = 1,
    pass_tokens: int = PASS_TOKENS,
) -> Tensor:
    """The metric after each change, each in a run of its own: `(changes, batch)`.

    score: `Scored.of`. length: tokens of an example, by which passes are filled. Nothing of the
    model is changed afterwards.
    """
    copies = max(1, pass_tokens // max(1, prefix.batch * length))
    starts = [prefix.start_of(dict.fromkeys((e.site for e in c), _nothing)) for c in changes]
    order = sorted(range(len(changes)), key=lambda i: starts[i])
    found: list[Tensor | None] = [None] * len(changes)
    for chosen in _runs(order, starts, copies):
        with torch.no_grad():
            logits = prefix.run(
                _writes([changes[i] for i in chosen], prefix.batch),
                copies=len(chosen),
                start=starts[chosen[0]],
            )
            for i, scores in zip(chosen, score(logits), strict=True):
                found[i] = scores
    rows = [one for one in found if one is not None]
    return torch.stack(rows) if rows else torch.empty(0, prefix.batch, dtype=torch.float64)


def _runs(order: list[int], starts: list[int], most: int) -> Iterator[list[int]]:
    """Changes that share a pass: at most so many, and those that start later wait for their own
    pass where theirs would be full as well."""
    waiting = list(order)
    while waiting:
        same = [i for i in waiting[:most] if starts[i] == starts[waiting[0]]]
        chosen = waiting[:most] if len(same) < most // 2 else same
        yield chosen
        waiting = waiting[len(chosen) :]


def _writes(changes: Sequence[Change], batch: int) -> dict[Site, Write]:
    by_site: dict[Site, list[tuple[int, Exchange]]] = {}
    for copy, change in enumerate(changes):
        for one in change:
            by_site.setdefault(one.site, []).append((copy, one))

    def writing(wanted: list[tuple[int, Exchange]]) -> Write:
        def write(there: Tensor) -> Tensor:
            made = there.clone()
            for copy, one in wanted:
                one.write(made[copy * batch : (copy + 1) * batch])
            return made

        return write

    return {site: writing(wanted) for site, wanted in by_site.items()}


def _nothing(there: Tensor) -> None:
    return None
