"""The exact effect of exchanging parts of a model, example by example, many parts in one pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from headwise.instruments.ablated_parts import Part, update_site
from headwise.instruments.clean_run import CleanRun, Start
from headwise.instruments.examples import Examples
from headwise.instruments.metrics import LogitDifference, Metric
from headwise.instruments.replacements import Replacement
from headwise.models import ModelView, Site, sites_of
from headwise.models.sites import Write

__all__ = ["MEMORY", "Measurement", "copies_that_fit", "values_of"]

MEMORY = 2**29
"""Bytes that the copies of one pass may take together, as `copies_that_fit` counts them."""
CACHE = 3 * 2**20  # bytes of the widest tensor of a layer, beyond which passes get slower again
ROWS = (256, 2048)  # tokens in one pass: fewer leave matrix products slow, more help nobody
FEW = 64  # tokens in one pass below which neighbouring layers had better run together


class Measurement:
    """The effects of some parts on batches, one after another.

    metric: what is measured; frozen: maps stay as in the clean run, so that effects go through
    values alone; copies: parts in one pass, None: as many as fit; reuse=False computes every pass
    from the first layer on.
    """

    def __init__(
        self,
        view: ModelView,
        parts: Sequence[Part],
        metric: Metric,
        replacement: Replacement,
        frozen: bool = False,
        copies: int | None = None,
        reuse: bool = True,
    ) -> None:
        self.view = view
        self.parts = parts
        self.metric = metric
        self.replacement = replacement
        self.copies = copies
        self.reuse = reuse
        self.sites = list(dict.fromkeys(site for part in parts for site in part.takes))
        self._maps = [s for kind in ("queries", "keys") if frozen for s in sites_of(view, kind)]
        self._takes_rows = "logits_to_keep" in inspect.signature(view.model.forward).parameters

    def clean(self, batch: Examples, more: Iterable[Site] = ()) -> CleanRun:
        """The unchanged run on a batch."""
        kept = self._kept(batch)
        inputs = batch.inputs | ({"logits_to_keep": kept} if kept else {})
        sites = [*_read(self.sites), *self._maps, *more]
        return CleanRun(self.view, inputs, sites, self.reuse, kept)

    def scores(self, batch: Examples, logits: Tensor, clean: Tensor) -> Tensor:
        """`(copies, examples)` of answers `(copies * examples, ...)`."""
        metric, count = self.metric.of(batch.rows), len(batch)
        clean = self._asked(batch, clean)
        return torch.stack(
            [
                metric.score(self._asked(batch, some), batch.inputs, clean)
                for some in logits.split(count)
            ]
        )

    def base(self, batch: Examples, clean: CleanRun) -> Tensor:
        """`(examples,)`: the metric of the unchanged model."""
        return self.scores(batch, clean.output, clean.output)[0].double()

    def effects(
        self, batch: Examples, clean: CleanRun, step: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        """`(parts, examples)`: metric of the changed model minus that of the unchanged one."""
        found = np.zeros((len(self.parts), len(batch)))
        before = self.base(batch, clean)
        values = values_of(clean.values, self.sites)
        draws = self.replacement.draws
        for draw in range(draws):
            instead = self.replacement.of(batch, values, draw)
            for start, numbers in self._passes(clean, batch):
                chosen = [self.parts[n] for n in numbers]
                writes = self._writes(chosen, clean, instead)
                with torch.no_grad():
                    logits = clean.run(writes, len(chosen), start)
                    after = self.scores(batch, logits, clean.output).double()
                found[numbers] += (after - before).cpu().numpy() / draws
                step(len(numbers))
        return found

    def frozen(self, clean: CleanRun) -> dict[Site, Write]:
        """What keeps the maps of all attentions as they were in the clean run."""

        def hold(site: Site) -> Write:
            def write(there: Tensor) -> Tensor:
                known = clean.values[site]
                return known.repeat(len(there) // len(known), *[1] * (known.dim() - 1))

            return write

        return {site: hold(site) for site in self._maps}

    def _writes(
        self, parts: Sequence[Part], clean: CleanRun, instead: Mapping[Site, Tensor]
    ) -> dict[Site, Write]:
        def exchange(site: Site) -> Write:
            takes = [(k, part.takes[site]) for k, part in enumerate(parts) if site in part.takes]
            stays = clean.values[update_site(site)] if site.kind == "residual" else 0
            new = (stays + instead[site]).expand_as(clean.values[site])

            def write(there: Tensor) -> Tensor:
                made = there.clone()
                for k, heads in takes:
                    rows = slice(k * clean.batch, (k + 1) * clean.batch)
                    if heads is None:
                        made[rows] = new.to(made.dtype)
                    else:
                        at = list(heads)
                        made[rows, :, at] = new[:, :, at].to(made.dtype)
                return made

            return write

        sites = dict.fromkeys(site for part in parts for site in part.takes)
        return {**self.frozen(clean), **{site: exchange(site) for site in sites}}

    def _passes(self, clean: CleanRun, batch: Examples) -> Iterator[tuple[Start, list[int]]]:
        """Parts that run together, those that start together first."""
        starts = [clean.start_of(part.takes) for part in self.parts]
        order = sorted(range(len(starts)), key=lambda n: starts[n])
        most = self.copies or copies_that_fit(self.view, batch, clean.output)
        waiting: list[int] = []
        for _, group in groupby(order, key=lambda n: starts[n]):
            waiting += group
            if len(waiting) * _tokens(batch) < FEW:  # the next layer's may come along
                continue
            yield from _cut(waiting, most, starts)
            waiting = []
        yield from _cut(waiting, most, starts)

    def _kept(self, batch: Examples) -> int | None:
        """How many of the last positions' logits are asked for, where the model can be told."""
        if not self._takes_rows or "logits_to_keep" in batch.inputs or "labels" in batch.inputs:
            return None
        at = self._places(batch)
        return None if at is None else batch.inputs["input_ids"].shape[1] - int(at.min())

    def _places(self, batch: Examples) -> Tensor | None:
        """`(examples,)`: the one position that the metric reads of each, where it reads one."""
        metric, ids = self.metric.of(batch.rows), batch.inputs.get("input_ids")
        if not isinstance(metric, LogitDifference) or ids is None or len(self.view.stacks) > 1:
            return None
        places = torch.arange(ids.shape[1])[None, :, None].expand(len(batch), -1, 1)
        zero = LogitDifference(0, 1, metric.at)  # its own reading of `at`, on numbers that tell it
        pair = torch.cat([places, torch.zeros_like(places)], -1).to(ids.device)
        found: Tensor = zero.score(pair, batch.inputs)
        return found

    def _asked(self, batch: Examples, logits: Tensor) -> Tensor:
        kept = self._kept(batch)
        at = None if kept is None else self._places(batch)
        if kept is None or at is None:
            return logits
        first = batch.inputs["input_ids"].shape[1] - kept
        return logits[torch.arange(len(logits), device=logits.device), at - first]


def values_of(known: Mapping[Site, Tensor], sites: Iterable[Site]) -> dict[Site, Tensor]:
    """What is exchanged at each site: what is there, or what a layer has added."""
    return {
        site: known[site] - known[update_site(site)] if site.kind == "residual" else known[site]
        for site in sites
    }


def copies_that_fit(view: ModelView, batch: Examples, answer: Tensor) -> int:
    """How many copies of a batch one pass carries: within `MEMORY` (on a GPU a quarter of what is
    free), and no more than make passes quicker.

    Counted for each copy: the answer three times, and 24 numbers as wide as the residual a token.
    """
    tokens = _tokens(batch)
    size = answer.element_size() * (3 * answer.numel() + 24 * view.width * tokens)
    widest = 4 * view.width * answer.element_size()
    room, rows = MEMORY, min(max(CACHE // widest, ROWS[0]), ROWS[1])
    if answer.is_cuda:
        room, rows = torch.cuda.mem_get_info(answer.device)[0] // 4, 32 * ROWS[1]
    return max(1, min(room // max(1, size), math.ceil(rows / tokens)))


def _tokens(batch: Examples) -> int:
    first = next(iter(batch.inputs.values()))
    n = first.shape[1] if first.dim() == 2 else 64  # an image is some dozens of patches
    return len(batch) * max(1, n)


def _cut(
    numbers: list[int], most: int, starts: Sequence[Start]
) -> Iterator[tuple[Start, list[int]]]:
    """Equal pieces of at most so many."""
    if not numbers:
        return
    pieces = math.ceil(len(numbers) / most)
    size = math.ceil(len(numbers) / pieces)
    for k in range(0, len(numbers), size):
        piece = numbers[k : k + size]
        first = min(starts[n] for n in piece)
        alone = all(starts[n] == first for n in piece)
        # what the others do not exchange has to be computed
        yield first if alone else Start(first.layer, first.attentions), piece


def _read(sites: Iterable[Site]) -> list[Site]:
    """Sites, and for what a layer leaves also what it reads."""
    found = []
    for site in sites:
        found += [site, update_site(site)] if site.kind == "residual" else [site]
    return list(dict.fromkeys(found))
