"""Rows of a cache that hold the same number of entries, stacked."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.compress.cache.buffer import Buffer
from headwise.compress.cache.store import Plain, Store

FORGOTTEN = -1
"""The position of an entry that is not valid."""


class Block:
    """`rows` `(R,)`, their numbers, ascending; `store` of n entries each; their positions
    `(R, n)` int32, -1 where an entry is not valid; what a policy noted of each, `(R, n)` float32,
    or None. `whole`: the block is all rows of its layer. `gaps`: some entry is not valid."""

    def __init__(
        self,
        rows: Tensor,
        store: Store,
        positions: Buffer,
        state: Buffer | None,
        whole: bool,
        gaps: bool,
    ) -> None:
        self.rows, self.store, self.whole, self.gaps = rows, store, whole, gaps
        self._positions, self._state = positions, state

    @classmethod
    def of(cls, store: Store, positions: Tensor, gaps: bool, room: int = 0) -> Block:
        """All rows of a layer, with positions `(R, n)`."""
        rows = torch.arange(positions.shape[0], device=positions.device)
        kept = Buffer.copied(positions.to(torch.int32), room)
        return cls(rows, store, kept, None, True, gaps)

    @property
    def length(self) -> int:
        """n, with those that are not valid."""
        return self._positions.length

    @property
    def positions(self) -> Tensor:
        """`(R, n)` int32."""
        return self._positions.content

    @property
    def state(self) -> Tensor | None:
        """`(R, n)` float32, or None."""
        return None if self._state is None else self._state.content

    def note(self, state: Tensor) -> None:
        """What a policy noted of each entry, `(R, n)`. Raises ValueError for another shape."""
        if state.shape != self.positions.shape:
            raise ValueError(
                f"a policy's observe() returned {tuple(state.shape)}; expected (rows, entries) = "
                f"{tuple(self.positions.shape)}"
            )
        if self._state is None:
            room = self._positions.held.shape[1] - self.length
            self._state = Buffer.copied(state.float(), room)
        else:
            self._state.content.copy_(state)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, gaps: bool) -> None:
        """m entries of every row of the layer: keys `(rows, m, d)`, positions `(rows, m)`."""
        if not self.whole:
            keys, values, positions = (t[self.rows] for t in (keys, values, positions))
        self.store.append(keys, values)
        self._positions.append(positions)
        if self._state is not None:
            self._state.append(torch.zeros_like(positions, dtype=torch.float32))
        self.gaps |= gaps

    def select(self, at: Tensor, indices: Tensor, valid: Tensor | None, room: int) -> Block:
        """The entries `indices` `(R', k)`, ascending, of the rows at the places `at` `(R',)`.
        This block must not be used any more. `valid`: `(R', k)`, False where an entry is there
        only to fill up, None: all are real."""
        every = len(at) == len(self.rows)
        if every:
            store = self.store.keep(indices, room)
        elif isinstance(self.store, Plain):
            store = self.store.select(indices, room, at)  # rows and entries in one copy
        else:
            store = self.store.rows(at).select(indices, room)
        positions = self._positions.select(indices, room, at)
        if valid is not None:
            positions.content.masked_fill_(~valid, FORGOTTEN)
        state = None if self._state is None else self._state.select(indices, room, at)
        whole = self.whole and every
        return Block(self.rows[at], store, positions, state, whole, valid is not None)

    def renumbered(self, at: Tensor, rows: Tensor, whole: bool) -> Block:
        """The rows at the places `at` `(R',)`, with new numbers; a row may come several times."""
        state = None if self._state is None else self._state.rows(at)
        store = self.store.rows(at)
        return Block(rows, store, self._positions.rows(at), state, whole, self.gaps)

    def crop(self, count: int) -> None:
        """Forget the newest `count` entries of every row."""
        length = self.length - count
        self.store.crop(length)
        self._positions.crop(length)
        if self._state is not None:
            self._state.crop(length)

    def copied(self) -> Block:
        """A block of its own."""
        positions, state = copy.deepcopy(self._positions), copy.deepcopy(self._state)
        return Block(
            self.rows.clone(), copy.deepcopy(self.store), positions, state, self.whole, self.gaps
        )

    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        state = 0 if self._state is None else self._state.nbytes()
        rows = self.rows.untyped_storage().nbytes()
        return self.store.nbytes() + self._positions.nbytes() + state + rows

    @classmethod
    def joined(cls, blocks: Sequence[Block], total: int, room: int) -> list[Block]:
        """Blocks of one length as one block of a layer of `total` rows; as they are where their
        stores cannot be joined."""
        if len(blocks) == 1:
            return [*blocks]
        stores = [block.store for block in blocks]
        store = type(stores[0]).join(stores, room)
        if store is None:
            return [*blocks]
        rows = torch.cat([block.rows for block in blocks])
        state = None
        if all(block._state is not None for block in blocks):
            state = Buffer.joined([b._state for b in blocks if b._state is not None], room)
        positions = Buffer.joined([b._positions for b in blocks], room)
        gaps = any(block.gaps for block in blocks)
        made = cls(rows, store, positions, state, False, gaps)
        order = rows.argsort()
        whole = len(rows) == total
        if bool((order == torch.arange(len(rows), device=rows.device)).all()):
            made.whole = whole
            return [made]
        return [made.renumbered(order, rows[order], whole)]
