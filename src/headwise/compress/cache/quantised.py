"""Keys and values of a few bits: keys by channel, values by token, the newest as they came.

Keys have channels that are large in every token, values have not, so that a range that many
tokens share in one channel costs keys least, and a range of the token's own costs values least
(KIVI, Liu et al. 2024, arXiv 2402.02750, sections 3 and 4). The newest tokens stay in full
precision, and so do the few of each group that stand out, where that is asked for. What is in
codes is not coded again: an eviction takes lines of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.compress.cache.buffer import Buffer
from headwise.compress.cache.coded import ByChannel, ByToken, Code
from headwise.compress.cache.hadamard import rotate
from headwise.compress.cache.in_codes import InCodes
from headwise.compress.cache.outliers import Outliers, distances, largest_of_groups
from headwise.compress.cache.packing import BITS, SCALES
from headwise.compress.cache.store import Exact, Piece, Store

TILE = 2**19
"""How many numbers are unpacked at once, at most, unless one group is more."""

FEW = 4
"""Up to so many queries of a row codes are multiplied as they are; more are worth unpacking."""


@dataclass(frozen=True)
class Coding:
    """How a layer's cache is coded; `make` makes stores of it, as a cache asks for them.

    `key_bits`, `value_bits`: 1, 2, 3, 4 or 8. `group`: tokens that share the ranges of their keys,
    and channels that share those of a value. `residual`: the newest tokens in full precision
    (`residual` to `residual + group - 1` of them, since groups go together). `outliers`: tokens of
    each group that are kept in full precision too: those whose keys lie furthest from the group's
    mean, or those of most attention where the cache tells (`Quantised.settle`). `rotated`: keys
    and values times a Hadamard matrix first. `keys`: "channel" or "token". `scales`: type of the
    ranges. Raises ValueError for what cannot be.
    """

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32
    residual: int = 32
    outliers: int = 0
    rotated: bool = False
    keys: str = "channel"
    scales: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(str, BITS))}"
                )
        if self.group < 1 or self.residual < 0:
            raise ValueError(
                f"group={self.group}, residual={self.residual}: expected a group of 1 or more "
                "tokens and a residual of 0 or more"
            )
        if not 0 <= self.outliers < self.group:
            raise ValueError(
                f"outliers={self.outliers}: expected 0 or more, and fewer than a group of "
                f"{self.group} has"
            )
        if self.keys not in ("channel", "token"):
            raise ValueError(f"keys={self.keys!r}: expected 'channel' or 'token'")
        if self.scales not in SCALES:
            raise ValueError(f"scales={self.scales}: expected one of {SCALES}")

    def make(self, keys: Tensor, values: Tensor, room: int = 0) -> Quantised:
        """A store of keys `(R, n, d)` and values `(R, n, d_v)`. They are coded when the store
        settles: at the next `append`, at a `select`, or when told."""
        kind = ByChannel if self.keys == "channel" else ByToken
        if self.rotated:
            keys, values = rotate(keys), rotate(values)
        return Quantised(
            self,
            kind.empty(Code(self.key_bits, self.group, self.scales), keys),
            ByToken.empty(Code(self.value_bits, self.group, self.scales), values),
            (Buffer.copied(keys), Buffer.copied(values)),
            Outliers.none(keys, values),
        )


class Quantised(Store):
    """A store by a `Coding`: tokens in codes, oldest first, then the newest in full precision.

    With `coding.rotated` the keys of `tiles` are rotated, and so are its values: ask them with
    `turned(queries)` and take `turned_back` of what comes out.
    """

    def __init__(
        self,
        coding: Coding,
        keys: ByChannel | ByToken,
        values: ByToken,
        newest: tuple[Buffer, Buffer],
        outliers: Outliers,
    ) -> None:
        self.coding, self._keys, self._values = coding, keys, values
        self._newest, self._outliers = newest, outliers

    @property
    def length(self) -> int:
        return len(self._keys) + self._newest[0].length

    @property
    def coded(self) -> int:
        """How many tokens of each row are in codes (outliers among them)."""
        return len(self._keys)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.settle()
        if self.coding.rotated:
            keys, values = rotate(keys), rotate(values)
        self._newest[0].append(keys)
        self._newest[1].append(values)

    def settle(self, worth: Tensor | None = None) -> None:
        """Code what is older than the residual, in whole groups.

        worth: `(R, n)` of every entry, such as the attention that it received: the outliers of a
        group are then those of most worth.
        """
        coding = self.coding
        count = (self._newest[0].length - coding.residual) // coding.group * coding.group
        if count <= 0:
            return
        keys, values = (held.content[:, :count] for held in self._newest)
        counted = None
        if coding.outliers:
            stands_out = distances(keys, coding.group)
            if worth is not None:
                stands_out = worth[:, self.coded : self.coded + count]
            at = largest_of_groups(stands_out, coding.group, coding.outliers)
            counted = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
            counted.scatter_(1, at, False)
            each = torch.arange(len(at), device=at.device)[:, None]
            self._outliers.append(at + self.coded, keys[each, at], values[each, at])
        self._keys.append(keys, counted)
        self._values.append(values)
        first, second = self._newest
        self._newest = (
            Buffer.copied(first.content[:, count:], coding.group),
            Buffer.copied(second.content[:, count:], coding.group),
        )

    def select(self, indices: Tensor, room: int = 0) -> Quantised:
        """Rows may keep different numbers of the newest: those of a row that are more than every
        row has are coded, in a group of their own, so that all rows have as many in codes."""
        new = int((indices >= self.coded).sum(1).min()) if indices.numel() else 0
        old = indices.shape[1] - new
        into, newest = indices[:, :old], indices[:, old:] - self.coded
        source = self._with_newest_coded(into) if bool((into >= self.coded).any()) else self
        made = Quantised(
            self.coding,
            source._keys.select(into, room),
            source._values.select(into, room),
            (self._newest[0].select(newest), self._newest[1].select(newest)),
            source._outliers.select(into, len(source._keys)),
        )
        made.settle()
        return made

    def _with_newest_coded(self, wanted: Tensor) -> Quantised:
        """A copy in which the newest are coded too, as one group that covers those `wanted`."""
        made = self.rows(torch.arange(len(wanted), device=wanted.device))
        keys, values = (held.content for held in self._newest)
        flags = torch.zeros((len(wanted), self.length), dtype=torch.bool, device=wanted.device)
        flags.scatter_(1, wanted, True)
        made._keys.append(keys, flags[:, self.coded :], keys.shape[1])
        made._values.append(values)
        return made

    def rows(self, indices: Tensor) -> Quantised:
        first, second = self._newest
        return Quantised(
            self.coding,
            self._keys.rows(indices),
            self._values.rows(indices),
            (first.rows(indices), second.rows(indices)),
            self._outliers.rows(indices),
        )

    def crop(self, length: int) -> None:
        for held in self._newest:
            held.crop(max(0, length - self.coded))
        if length < self.coded:
            self._keys.crop(length)
            self._values.crop(length)
            self._outliers.crop(length)

    @classmethod
    def join(cls, stores: list[Store], room: int = 0) -> Quantised | None:
        """None where codings or lengths differ. Where some rows have fewer tokens in codes, the
        oldest of their newest are coded first."""
        made = [store for store in stores if isinstance(store, Quantised)]
        same = len({store.coding for store in made}) == len({s.length for s in stores}) == 1
        if len(made) != len(stores) or not same:
            return None
        most = max(store.coded for store in made)
        aligned = [store if store.coded == most else store._coded_to(most) for store in made]
        kind: Any = type(aligned[0]._keys)  # equal codings: all of one kind
        return Quantised(
            aligned[0].coding,
            kind.joined([store._keys for store in aligned], room),
            ByToken.joined([store._values for store in aligned], room),
            (
                Buffer.joined([store._newest[0] for store in aligned]),
                Buffer.joined([store._newest[1] for store in aligned]),
            ),
            Outliers.joined([store._outliers for store in aligned]),
        )

    def _coded_to(self, count: int) -> Quantised:
        """A copy with `count` tokens in codes."""
        made = self.rows(torch.arange(self._newest[0].held.shape[0], device=self.device))
        more = count - self.coded
        keys, values = (held.content for held in made._newest)
        made._keys.append(keys[:, :more], group=more)
        made._values.append(values[:, :more])
        made._newest = (Buffer.copied(keys[:, more:]), Buffer.copied(values[:, more:]))
        return made

    @property
    def device(self) -> torch.device:
        return self._newest[0].held.device

    def turned(self, queries: Tensor) -> Tensor:
        """Queries `(..., d)` as the keys of `tiles` are to be asked: scores stay."""
        return rotate(queries) if self.coding.rotated else queries

    def turned_back(self, out: Tensor) -> Tensor:
        """What was averaged from values of `tiles`, `(..., d_v)`, as the values were."""
        return rotate(out) if self.coding.rotated else out

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in self._cuts():
            keys, values = self._keys.piece(start, stop), self._values.piece(start, stop)
            self._outliers.put(start, stop, keys, values)
            yield keys, values
        if self._newest[0].length:
            yield self._newest[0].content, self._newest[1].content

    def pieces(self, count: int) -> Iterator[Piece]:
        """In codes, for a few queries."""
        if count > FEW:
            yield from super().pieces(count)
            return
        for start, stop in self._cuts():
            yield InCodes(self._keys, self._values, self._outliers, start, stop)
        if self._newest[0].length:
            yield Exact(self._newest[0].content, self._newest[1].content)

    def _cuts(self) -> Iterator[tuple[int, int]]:
        """Where tiles start and stop."""
        rows, _, width = self._newest[0].held.shape
        group = self.coding.group
        size = max(1, TILE // max(1, rows * width) // group) * group
        for start in range(0, self.coded, size):
            yield start, min(start + size, self.coded)

    def whole(self) -> tuple[Tensor, Tensor]:
        pieces = list(self.tiles()) or [(self._newest[0].content, self._newest[1].content)]
        keys, values = (torch.cat(side, 1) for side in zip(*pieces, strict=True))
        return self.turned_back(keys), self.turned_back(values)

    def nbytes(self) -> int:
        held = (self._keys, self._values, self._outliers, *self._newest)
        return sum(one.nbytes() for one in held)
