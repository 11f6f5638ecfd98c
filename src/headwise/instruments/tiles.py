"""Small dense pieces of real maps with their tokens, to be looked at."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.instruments.batch import Batch
from headwise.instruments.instrument import Findings, Instrument, Numbers
from headwise.instruments.reading import Reading
from headwise.models import ModelView

__all__ = ["SIZE", "Tiles", "liveliest"]

SIZE = 32
"""Tokens of a piece: the first of the input and a run of others."""


class Tiles(Instrument):
    """Weights among the first token and the run of 31 tokens in which most pairs of words come
    again, on the first input, the same for all heads: so that a sink and an induction both show.

    A piece has "head" (row of the table), "start" (position of the second token), "positions"
    and "tokens" of the queries, "keys" (tokens of the keys) where these are another sequence, and
    "weights" `(queries, keys)` in float16. Rows need not sum to one: the rest lies outside.
    """

    name = "tiles"
    columns = ()

    def start(self, view: ModelView, seed: int) -> None:
        starts = np.cumsum([0] + [a.heads for a in view.attentions])
        self._first_row = {a: int(starts[n]) for n, a in enumerate(view.attentions)}

    def begin(self, batch: Batch) -> None:
        self._wanted = batch.number == 0
        self._pieces: list[tuple[dict[str, Any], Tensor]] = []
        self._chosen: dict[tuple[str, int], list[int]] = {}

    def read(self, reading: Reading) -> Numbers:
        if not self._wanted:
            return {}
        s = reading.map.scores
        rows = self._places(reading.batch, reading.attention.stack, s.n_q, reading.rows)
        keys = rows
        if reading.cross:
            keys = self._places(reading.batch, "encoder", s.n_k, reading.keys)
        weights = _piece(reading, rows, keys)
        labels = _labels(reading.batch, reading.attention.stack, rows)
        piece: dict[str, Any] = {
            "head": self._first_row[reading.attention],
            "start": rows[1] if len(rows) > 1 else rows[0],
            "positions": rows,
            "tokens": labels,
        }
        if reading.cross:
            piece["keys"] = _labels(reading.batch, "encoder", keys)
        self._pieces.append((piece, weights))
        return {}

    def _places(self, batch: Batch, stack: str, n: int, real: Tensor | None) -> list[int]:
        if (stack, n) not in self._chosen:
            self._chosen[stack, n] = _places(batch, stack, n, real)
        return self._chosen[stack, n]

    def finish(self) -> Findings:
        tiles = []
        for piece, weights in self._pieces:
            dense = weights.half().cpu().numpy()
            for head, matrix in enumerate(dense):
                tiles.append({**piece, "head": piece["head"] + head, "weights": matrix})
        self._pieces = []
        return Findings(tiles=tiles)


def liveliest(ids: list[int], size: int, marks: list[bool] | None = None) -> int:
    """Where the run of `size` tokens begins in which most pairs of neighbouring tokens come
    again, each pair counted once, those with a delimiter (`marks`) not at all; the first such
    run. 0 for a short input."""
    best, found = 0, -1
    step = max(1, size // 4)
    for start in range(0, max(1, len(ids) - size + 1), step):
        run = list(pairwise(range(start, min(start + size, len(ids)))))
        pairs = [(ids[a], ids[b]) for a, b in run if marks is None or not (marks[a] or marks[b])]
        often = Counter(pair for pair in pairs if pair[0] != pair[1])
        score = sum(count > 1 for count in often.values())
        if score > found:
            best, found = start, score
    return best


def _places(batch: Batch, stack: str, n: int, real: Tensor | None) -> list[int]:
    """Positions of the piece in the first sample: its first token and a run of others."""
    low, high = 0, n
    if real is not None:
        inside = real[0].nonzero()[:, 0]
        low, high = int(inside[0]), int(inside[-1]) + 1
    count = min(SIZE, high - low) - 1
    ids = batch.ids.get(stack)
    start = low + 1
    if ids is not None and ids.shape[1] == n and high - low > SIZE:
        looked = slice(low + 1, min(high, low + 4096))
        marks = batch.delimiters.get(stack)
        start += liveliest(
            ids[0, looked].tolist(), count, None if marks is None else marks[0, looked].tolist()
        )
    return [low, *range(start, start + count)]


def _piece(reading: Reading, rows: list[int], keys: list[int]) -> Tensor:
    """Weights `(heads, rows, keys)` of the first sample, from four small tiles."""
    whole = [
        torch.cat([reading.map.tile(r, k)[0] for k in _slices(keys)], -1) for r in _slices(rows)
    ]
    return torch.cat(whole, 1)


def _slices(places: list[int]) -> list[slice]:
    first = slice(places[0], places[0] + 1)
    return [first, slice(places[1], places[-1] + 1)] if len(places) > 1 else [first]


def _labels(batch: Batch, stack: str, places: list[int]) -> list[str]:
    labels = batch.labels.get(stack)
    return [str(p) if labels is None or p >= len(labels) else labels[p] for p in places]
