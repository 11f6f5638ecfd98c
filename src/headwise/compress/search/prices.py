"""The price of every candidate: what the loss rises by without it, each by itself, exactly.

The model is run once on each batch; a run without a candidate starts at its layer, and all that
are taken out at one site go through the model together, as copies of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from headwise.compress.search.candidates import Candidate
from headwise.instruments.clean_run import CleanRun
from headwise.instruments.examples import Examples
from headwise.instruments.metrics import metric_of
from headwise.instruments.part_effects import copies_that_fit
from headwise.instruments.run import evaluating
from headwise.models import ModelView, Site
from headwise.models.sites import Write

__all__ = ["prices"]


def prices(
    view: ModelView,
    batches: Sequence[Examples],
    given: Sequence[Candidate],
    step: Callable[[int], object] | None = None,
) -> Tensor:
    """`(candidates,)`: the rise of the loss in nats, mean over all examples.

    step: called with the number of candidates that a pass has priced.
    """
    loss = metric_of("loss")
    total = torch.zeros(len(given), dtype=torch.float64)
    count = sum(map(len, batches))
    with torch.no_grad(), evaluating(view.model):
        for batch in batches:
            clean = CleanRun(view, batch.inputs)
            before = loss.score(clean.output, batch.inputs).double().sum()
            most = copies_that_fit(view, batch, clean.output)
            for numbers in _together(given, most):
                some = [given[number] for number in numbers]
                writes = _stacked([one.writes() for one in some])
                answer = clean.run(writes, len(some), clean.start_of(writes))
                for number, logits in zip(numbers, answer.split(len(batch)), strict=True):
                    after = loss.score(logits, batch.inputs).double().sum()
                    total[number] += (after - before).cpu() / count
                if step is not None:
                    step(len(some))
    return total


def _together(given: Sequence[Candidate], most: int) -> list[list[int]]:
    """Numbers of candidates that act at the same sites, at most so many at a time."""

    def key(number: int) -> tuple[int, str]:
        return (given[number].layer, given[number].kind)

    found = []
    for _, group in groupby(sorted(range(len(given)), key=key), key):
        numbers = list(group)
        found += [numbers[at : at + most] for at in range(0, len(numbers), most)]
    return found


def _stacked(each: Sequence[dict[Site, Write]]) -> dict[Site, Write]:
    """One write a site, in which every copy of the batch gets its own."""

    def of(site: Site) -> Write:
        def write(there: Tensor) -> Tensor:
            parts = there.chunk(len(each))
            changed = []
            for part, writes in zip(parts, each, strict=True):
                new = writes[site](part)
                changed.append(part if new is None else new)
            return torch.cat(changed)

        return write

    return {site: of(site) for site in each[0]}
