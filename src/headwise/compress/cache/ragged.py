"""The entries of one layer, ragged: how they come, are attended to, and go."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.compress.cache.block import Block
from headwise.compress.cache.block_attention import Query, attend_block
from headwise.compress.cache.eviction import Extent, evicted
from headwise.compress.cache.newest import Newest
from headwise.compress.cache.policy import Seen
from headwise.compress.cache.rules import Rules
from headwise.compress.cache.sequences import taken
from headwise.compress.cache.store import Plain


class Ragged:
    """`blocks` of rows; `length`: places seen, padding and what was let go of included; `real`:
    tokens of each sequence; `settled`: the length when entries were last let go of, behind which
    no crop can go; `due`: entries are to be let go of once the last step cannot be taken back."""

    def __init__(self, layer: int, window: int | None, rules: Rules) -> None:
        self.layer, self.window, self.rules = layer, window, rules
        self.blocks: list[Block] = []
        self.newest = Newest()
        self.real: list[int] = []
        self.kv_heads = 0
        self.length = self.settled = self._since = 0
        self.due = False
        self._shape: dict[str, Any] = {}  # of the map, as the model last said it

    # -- coming ------------------------------------------------------------------------------

    def begin(self, keys: Tensor, values: Tensor, asked: Query, real: Tensor | None) -> None:
        """The first m tokens, keys `(batch, kv_heads, m, d)`: held as they are until `let_go`.
        `real`: `(batch, m)`, False for padding, None where there is none."""
        self.kv_heads, self.real = keys.shape[1], [0] * keys.shape[0]
        store = Plain.around(keys.flatten(0, 1), values.flatten(0, 1))
        self.blocks = [Block.of(store, asked.positions, real is not None)]
        self._count(asked, real)

    def append(self, keys: Tensor, values: Tensor, asked: Query, real: Tensor | None) -> None:
        """m more tokens."""
        for block in self.blocks:
            gaps = real is not None
            block.append(keys.flatten(0, 1), values.flatten(0, 1), asked.positions, gaps)
        self._count(asked, real)

    def _count(self, asked: Query, real: Tensor | None) -> None:
        m = asked.count
        self.length += m
        self._since += m
        new = [m] * len(self.real) if real is None else real.sum(1).tolist()
        self.real = [before + more for before, more in zip(self.real, new, strict=True)]
        self._shape = {"scale": asked.scale, "softcap": asked.softcap}

    # -- being looked at ---------------------------------------------------------------------

    def attend(self, asked: Query, width: int) -> Tensor:
        """`(rows, g, m, width)` for the queries of the m newest tokens, one call per block."""
        if len(self.blocks) == 1:
            return attend_block(asked, self.blocks[0])
        out = asked.queries.new_empty((*asked.queries.shape[:3], width))
        for block in self.blocks:
            out[block.rows] = attend_block(asked.of(block), block)
        return out

    def observe(self, asked: Query) -> None:
        """Let the policy note what it wants to of these queries."""
        policy = self.rules.policy
        if policy.needs_queries:
            self.newest.add(asked.queries, asked.positions, policy.needs_queries)
        if not self.rules.observes:
            return
        for block in self.blocks:
            chunk = (asked.queries, asked.positions) if policy.needs_queries is None else None
            state = policy.observe(self.seen(block, chunk))
            if state is not None:
                block.note(state)

    def seen(self, block: Block, chunk: tuple[Tensor, Tensor] | None = None) -> Seen:
        """What a policy sees of a block; `chunk`: the queries of all rows, and their places."""
        keys, values = block.store.whole()
        queries, at = self.newest.of(keys, len(self.real) * self.kv_heads)
        if chunk is not None:
            queries, at = chunk
        if not block.whole:
            queries, at = queries[block.rows], at[block.rows]
        return Seen(
            self.layer,
            block.rows,
            keys,
            values,
            block.positions.long(),
            queries,
            at.long(),
            state=block.state,
            kv_heads=self.kv_heads,
            window=self.window,
            **self._shape,
        )

    # -- going -------------------------------------------------------------------------------

    def let_go(self, first: bool, wait: bool) -> None:
        """What is over the budget after a step. `first`: the step was `begin`; `wait`: the step
        may be taken back."""
        if first:
            (borrowed,) = self.blocks
            if wait:
                self.due = True
            else:
                self.evict()
            make = self.rules.makers[self.layer]
            if self.blocks[0] is borrowed or make != Plain.make:
                for block in self.blocks:
                    block.store = make(*block.store.whole(), self.rules.patience(block.length))
        elif self._since >= self.rules.patience(max(block.length for block in self.blocks)):
            if wait:
                self.due = True
            else:
                self.evict()
        if not wait:
            for block in self.blocks:
                block.store.settle(block.state)

    def evict(self) -> None:
        """Cut every row to its budget."""
        self.due, self._since = False, 0
        extent = Extent(self.layer, self.length, self.real, self.kv_heads, self.window)
        kept = evicted(self.blocks, extent, self.rules, self.seen)
        if kept is not None:
            self.blocks, self.settled = kept, self.length

    def forget(self, count: int) -> None:
        """The newest `count` places, none of which was let go of."""
        self.length -= count
        gone: dict[int, int] = {}
        for block in self.blocks:
            tail = (block.positions[:, -count:] >= self.length).sum(1).tolist()
            gone.update(zip((block.rows // self.kv_heads).tolist(), tail, strict=True))
            block.crop(count)
        self.real = [real - gone[sequence] for sequence, real in enumerate(self.real)]
        self.newest.crop(count)
        self._since = max(0, self._since - count)

    # -- other sequences, copies, figures ----------------------------------------------------

    def take(self, sequences: list[int]) -> None:
        """Sequence i becomes what sequence `sequences[i]` was."""
        if not self.blocks or sequences == list(range(len(self.real))):
            return
        self.blocks = taken(self.blocks, sequences, self.kv_heads)
        self.newest.take(sequences, self.kv_heads)
        self.real = [self.real[sequence] for sequence in sequences]

    def copied(self) -> Ragged:
        made = Ragged(self.layer, self.window, self.rules)
        made.__dict__.update(self.__dict__)
        made.blocks = [block.copied() for block in self.blocks]
        made.newest, made.real = self.newest.copied(), list(self.real)
        return made

    def kept(self) -> list[list[int]]:
        """For every row, the places of its entries in the sequence, ascending."""
        found: dict[int, list[int]] = {}
        for block in self.blocks:
            for row, at in zip(block.rows.tolist(), block.positions.tolist(), strict=True):
                found[row] = sorted(place for place in at if place >= 0)
        return [found[row] for row in sorted(found)]

    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        return sum(block.nbytes() for block in self.blocks) + self.newest.nbytes()
