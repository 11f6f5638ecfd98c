"""What a block of a cache keeps its keys and values in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.compress.cache.buffer import Buffer


class Piece(ABC):
    """t neighbouring entries of R rows, as they are attended to."""

    @abstractmethod
    def __len__(self) -> int:
        """t."""

    @abstractmethod
    def scores(self, queries: Tensor) -> Tensor:
        """`(R, c, t)`: products of queries `(R, c, d)` with the keys, in the queries' type."""

    @abstractmethod
    def summed(self, weights: Tensor) -> Tensor:
        """`(R, c, d_v)`: the values, each times its weight `(R, c, t)`."""


@dataclass(frozen=True)
class Exact(Piece):
    """Keys `(R, t, d)` and values `(R, t, d_v)`."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.keys.shape[1]

    def scores(self, queries: Tensor) -> Tensor:
        """Keys times queries, not queries times keys: a product of a tall matrix by a few columns
        is the quicker one."""
        return torch.bmm(self.keys.to(queries.dtype), queries.transpose(1, 2)).transpose(1, 2)

    def summed(self, weights: Tensor) -> Tensor:
        return torch.bmm(weights, self.values.to(weights.dtype))


class Store(ABC):
    """Keys `(R, n, d)` and values `(R, n, d_v)` of R rows with n entries each, oldest first.

    `select` and `rows` return a new store of the same kind and leave this one as it is; `append`
    changes this one. What is kept is kept as it is: a store that loses precision loses it once,
    not again at every selection.

    A subclass is made by `Subclass.make(keys, values, room)`; a cache takes any callable of these
    three arguments that returns a Store.
    """

    @property
    @abstractmethod
    def length(self) -> int:
        """n, entries in each row."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Put m entries `(R, m, d)`, `(R, m, d_v)` at the end of every row; copied."""

    @abstractmethod
    def select(self, indices: Tensor, room: int = 0) -> Store:
        """The entries `indices` `(R, k)` int64, ascending in each row. `room`: entries that will
        probably be appended."""

    def keep(self, indices: Tensor, room: int = 0) -> Store:
        """As `select`, for when this store is not needed any more."""
        return self.select(indices, room)

    @abstractmethod
    def rows(self, indices: Tensor) -> Store:
        """The rows `indices` `(R',)` int64; a row may come several times or not at all."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget all but the first `length` entries of every row."""

    @abstractmethod
    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys `(R, t, d)` and values `(R, t, d_v)` in pieces, in order, as they are to be
        attended: exact ones in one piece, packed ones in pieces small enough that never all of
        them lie unpacked."""

    def pieces(self, count: int) -> Iterator[Piece]:
        """The same, for `count` queries of every row, by whatever is quickest for so many."""
        for keys, values in self.tiles():
            yield Exact(keys, values)

    def settle(self, worth: Tensor | None = None) -> None:
        """Nothing of what came last will be let go now: pack what is to be packed. Called at the
        end of every chunk and decoded token. worth: `(R, n)`, what a policy thinks of each entry,
        where it says so; a store may hold those of most worth more exactly."""
        return

    def turned(self, queries: Tensor) -> Tensor:
        """Queries `(R, ..., d)` as the keys of `tiles` are to be asked: a store may hold both
        turned, with the scores that they had."""
        return queries

    def turned_back(self, out: Tensor) -> Tensor:
        """What was averaged from the values of `tiles`, `(R, ..., d_v)`, as the values were."""
        return out

    @abstractmethod
    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys `(R, n, d)` and values `(R, n, d_v)`, unpacked, for policies and tests."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of every tensor held, room to spare included."""

    @classmethod
    def join(cls, stores: list[Store], room: int = 0) -> Store | None:
        """One store of the rows of several that have the same length, or None where it does not
        work without loss: they then stay apart."""
        return None


class Plain(Store):
    """Keys and values as they came, in buffers with room to grow."""

    def __init__(self, keys: Buffer, values: Buffer) -> None:
        self._keys, self._values = keys, values

    @classmethod
    def make(cls, keys: Tensor, values: Tensor, room: int = 0) -> Plain:
        """Of copies of keys `(R, n, d)` and values `(R, n, d_v)`, with room for `room` more."""
        return cls(Buffer.copied(keys, room), Buffer.copied(values, room))

    @classmethod
    def around(cls, keys: Tensor, values: Tensor) -> Plain:
        """Of the tensors themselves, without a copy, until the first `append`."""
        return cls(
            Buffer(keys, keys.shape[1], lent=True), Buffer(values, values.shape[1], lent=True)
        )

    @property
    def length(self) -> int:
        return self._keys.length

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._keys.append(keys)
        self._values.append(values)

    def select(self, indices: Tensor, room: int = 0, at: Tensor | None = None) -> Plain:
        """`at`: `(R',)`, only these rows; both selections are one copy."""
        keys = self._keys.select(indices, room, at)
        return Plain(keys, self._values.select(indices, room, at))

    def keep(self, indices: Tensor, room: int = 0) -> Plain:
        return Plain(self._keys.keep(indices, room), self._values.keep(indices, room))

    def rows(self, indices: Tensor) -> Plain:
        return Plain(self._keys.rows(indices), self._values.rows(indices))

    def crop(self, length: int) -> None:
        self._keys.crop(length)
        self._values.crop(length)

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._keys.content, self._values.content

    def whole(self) -> tuple[Tensor, Tensor]:
        return self._keys.content, self._values.content

    def nbytes(self) -> int:
        return self._keys.nbytes() + self._values.nbytes()

    @classmethod
    def join(cls, stores: list[Store], room: int = 0) -> Plain | None:
        plain = [store for store in stores if isinstance(store, Plain)]
        if len(plain) != len(stores):
            return None
        return Plain(
            Buffer.joined([s._keys for s in plain], room),
            Buffer.joined([s._values for s in plain], room),
        )
