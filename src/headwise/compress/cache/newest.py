"""The newest queries of a layer, for a policy that asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Newest:
    """`queries` `(rows, g, m, d)` and their places `(rows, m)` int32, oldest first; none at all
    until the first come."""

    def __init__(self, queries: Tensor | None = None, places: Tensor | None = None) -> None:
        self.queries, self.places = queries, places

    def add(self, queries: Tensor, places: Tensor, limit: int) -> None:
        """New ones at the end; of all no more than the newest `limit` stay, and of a row that
        ends in padding its newest real ones."""
        if bool((places[:, -limit:] < 0).any()):
            order = (places >= 0).to(torch.int8).argsort(stable=True, dim=1)[:, -limit:]
            rows = torch.arange(len(order), device=order.device)[:, None]
            queries, places = (
                queries.transpose(1, 2)[rows, order].transpose(1, 2),
                places[rows, order],
            )
        queries, places = queries[:, :, -limit:], places[:, -limit:]
        if self.queries is None or self.places is None:
            self.queries, self.places = queries.clone(), places.clone()
            return
        room = limit - queries.shape[2]
        old = max(0, self.queries.shape[2] - room)
        self.queries = torch.cat([self.queries[:, :, old:], queries], 2)
        self.places = torch.cat([self.places[:, old:], places], 1)

    def of(self, keys: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Queries and places of all rows; with m = 0 where there are none (`keys` say of what)."""
        if self.queries is None or self.places is None:
            none = keys.new_empty(rows, 1, 0, keys.shape[-1])
            return none, keys.new_empty(rows, 0, dtype=torch.int32)
        return self.queries, self.places

    def crop(self, count: int) -> None:
        """Without the newest `count`."""
        if self.queries is not None and self.places is not None:
            left = max(0, self.queries.shape[2] - count)
            self.queries = self.queries[:, :, :left].clone()
            self.places = self.places[:, :left].clone()

    def take(self, sequences: Sequence[int], kv_heads: int) -> None:
        """Those of other sequences, each of which may come several times."""
        if self.queries is not None and self.places is not None:
            rows = [s * kv_heads + head for s in sequences for head in range(kv_heads)]
            at = torch.tensor(rows, device=self.queries.device)
            self.queries, self.places = self.queries[at], self.places[at]

    def copied(self) -> Newest:
        if self.queries is None or self.places is None:
            return Newest()
        return Newest(self.queries.clone(), self.places.clone())

    def nbytes(self) -> int:
        held = (self.queries, self.places)
        return sum(t.untyped_storage().nbytes() for t in held if t is not None)
