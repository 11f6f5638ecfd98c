"""What a policy of eviction sees of a cache, and what it says about it.

Words: a *row* is one key-value head of one sequence; an *entry* is one cached key with its value.
R rows that hold the same number n of entries are seen together. Numbers of rows are
`sequence * kv_heads + head`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headwise.maps import AttentionMap, Pattern


@dataclass(frozen=True)
class Seen:
    """R rows of one layer as they are when a policy is asked.

    `rows`: `(R,)`, sequence * kv_heads + head. `keys`: `(R, n, d)` with their rotation in them,
    `values`: `(R, n, d_v)`, `positions`: `(R, n)` int64, the place of each entry in the sequence,
    padding included; entries lie in their order in the sequence; -1 = not valid (padding: never
    attended, evicted first whatever its score). `queries`: `(R, g, m, d)`, the newest m queries of
    the g query heads that read a row, `query_positions`: `(R, m)`, -1 = padding; m is 0 for a
    policy that needs none, and smaller than asked for where fewer tokens were seen. `scale`:
    scores are scale * q . k. `state`: `(R, n)` float32, what `Policy.observe` returned so far (0
    for entries that came since), None where it never returned any. `kv_heads`: of this layer.
    `window`: the layer's sliding window (a query sees that many keys, itself included), None
    where it sees all. `softcap`: scores become cap * tanh(scores / cap).

    Tensors are those of the cache: read them, do not write into them.
    """

    layer: int
    rows: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor
    query_positions: Tensor
    scale: float
    state: Tensor | None = None
    kv_heads: int = 1
    window: int | None = None
    softcap: float | None = None

    @property
    def heads(self) -> Tensor:
        """`(R,)`: the key-value head of each row."""
        return self.rows % self.kv_heads

    @property
    def valid(self) -> Tensor:
        """`(R, n)`: True where an entry is no padding."""
        return self.positions >= 0

    def map(self) -> AttentionMap:
        """The attention map `(R, g, m, n)` of the queries over the entries: a row is a sequence
        of its own, with g heads that share one key-value head. Who may look at whom follows from
        the positions; nothing dense is made."""
        from headwise.maps import AttentionMap

        return AttentionMap(
            self.queries,
            self.keys[:, None],
            pattern=self._pattern,
            scale=self.scale,
            softcap=self.softcap,
        )

    @cached_property
    def _pattern(self) -> Pattern:
        from headwise.maps import Causal, KeyMask, Predicate, Window

        m = self.query_positions.shape[1]
        newest = self.positions[:, self.positions.shape[1] - m :]
        pattern: Pattern = Causal()
        aligned = newest.shape == self.query_positions.shape and bool(
            (newest == self.query_positions).all()
        )
        if self.window is not None and self._is_gapless:
            pattern = Window(self.window)
        elif self.window is not None or not aligned:
            pattern = Predicate(self._looks)
        return pattern if bool(self.valid.all()) else pattern & KeyMask(self.valid)

    @property
    def _is_gapless(self) -> bool:
        first = self.positions[:, :1]
        there = torch.arange(self.positions.shape[1], device=first.device)
        return bool((self.positions == first + there).all()) and bool(
            (self.query_positions == self.positions[:, -self.query_positions.shape[1] :]).all()
        )

    def _looks(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # patterns align the queries at the last key
        i = i - (self.positions.shape[1] - self.query_positions.shape[1])
        query, key = self.query_positions[b, i], self.positions[b, j]
        seen = (key >= 0) & (key <= query)
        return seen if self.window is None else seen & (key > query - self.window)


class Policy(ABC):
    """Which entries are worth keeping.

    The cache itself never lets go of the sinks and the window, and lets go of padding first: a
    policy need not know of them. One policy serves all layers and rows of a cache, so it keeps
    nothing about them on itself: what it wants to remember of each entry is the state that
    `observe` returns, which the cache carries along (through eviction, beams and copies).
    """

    needs_queries: int | None = 0
    """How many of the newest queries `observe` and `score` get: 0 none; w a window (the cache then
    stores the newest w, and counts their bytes); None: all of the chunk or token that just came,
    which only `observe` gets (`score` then has m = 0)."""

    def observe(self, seen: Seen) -> Tensor | None:
        """New state `(R, n)` of the entries, or None to leave it as it is. Called after every
        chunk and every decoded token, before anything is evicted, if it is overridden. Rows of a
        layer may come in several calls."""
        return None

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """What each entry is worth, `(R, n)`, finite; higher is kept. Called when rows are over
        their budget. Scores are compared within a row, by an adaptive budget also between the
        rows of one sequence in one layer."""
