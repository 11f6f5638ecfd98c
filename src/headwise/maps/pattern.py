"""Patterns: the algebra of who may look at whom.

Positions are key positions: with `n_q` queries and `n_k` keys, query row `r` stands at
`i = r + n_k - n_q` (aligned at the end, as a chunk of queries against a longer cache is).
Combine with `&`, `|` and `~`:

    Causal() & Window(512) | Sinks(4) & Causal()

A window counts the keys that a query sees, itself included, as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headwise.maps.ranges import KeyRanges, Range, Ranges, normalize

MAX_RUNS = 64  # a key mask with more runs than this is treated as one long maybe


class Pattern:
    """Which (query, key) pairs are allowed. Immutable; tensors inside are not copied."""

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        """Whether the query at position `i` may look at the key at position `j`.

        All arguments are integer tensors that broadcast together; the result is boolean of the
        broadcast shape. `batch` and `head` are needed only by patterns that differ by them.
        """
        raise NotImplementedError

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        """Keys that the queries at positions [start, stop) can see, whatever batch and head."""
        return KeyRanges(((0, n_k),), ())

    @property
    def by_batch(self) -> bool:
        """Whether the pattern differs between the rows of a batch."""
        return False

    def tile(self, i: Tensor, j: Tensor, batch: Tensor, head: Tensor) -> Tensor:
        """Boolean `(batch or 1, heads or 1, len(i), len(j))` for index vectors i, j, batch, head."""
        mask = self.allowed(
            i[:, None], j[None, :], batch[:, None, None, None], head[None, :, None, None]
        )
        return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)

    def mask(
        self, n_q: int, n_k: int, batch: int = 1, heads: int = 1, device: str | torch.device = "cpu"
    ) -> Tensor:
        """The dense mask `(batch or 1, heads or 1, n_q, n_k)`, True = may look. For tests."""
        j = torch.arange(n_k, device=device)
        i = torch.arange(n_q, device=device) + (n_k - n_q)
        b, h = torch.arange(batch, device=device), torch.arange(heads, device=device)
        out = self.tile(i, j, b, h)
        return out.expand(out.shape[0], out.shape[1], n_q, n_k)

    def mask_mod(self, n_q: int, n_k: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """A FlexAttention mask_mod `(b, h, q_index, kv_index) -> bool` of this pattern."""
        offset = n_k - n_q

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.allowed(q_idx + offset, kv_idx, b, h)

        return mask_mod

    def __repr__(self) -> str:
        held = []
        for name, value in vars(self).items():
            if not name.startswith("_"):
                shape = f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                held.append(f"{name}={shape}")
        return f"{type(self).__name__}({', '.join(held)})"

    def __and__(self, other: Pattern) -> Pattern:
        return both(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return either(self, other)

    def __invert__(self) -> Pattern:
        return self.of if isinstance(self, Not) else Not(self)


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Everybody sees everybody."""

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return (i == i) & (j == j)

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        return KeyRanges(((0, n_k),), ((0, n_k),))


@dataclass(frozen=True, repr=False)
class Window(Pattern):
    """A band around the diagonal.

    `left`: keys seen looking back, the query's own position included (`j > i - left`), as
    transformers' `sliding_window` counts; None = no limit. `right`: keys seen ahead
    (`j <= i + right`); None = no limit. So `Window(1)` sees itself only, `Window(4)` itself and
    the three keys before it, `Window(None, 0)` is causal.
    """

    left: int | None
    right: int | None = 0

    def __post_init__(self) -> None:
        if self.left is not None and self.left < 0:
            raise ValueError(f"Window(left={self.left}): left counts keys, give 0 or more or None")

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        distance = i - j
        inside = distance == distance
        if self.left is not None:
            inside = inside & (distance < self.left)
        if self.right is not None:
            inside = inside & (distance >= -self.right)
        return inside

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        # the first query reaches furthest back, the last one furthest ahead; what all of them
        # see begins where the last one's band begins and ends where the first one's ends
        low = 0 if self.left is None else start - self.left + 1
        high = n_k if self.right is None else stop + self.right
        sure_low = 0 if self.left is None else stop - self.left
        sure_high = n_k if self.right is None else start + self.right + 1
        return KeyRanges(normalize([(low, high)], n_k), normalize([(sure_low, sure_high)], n_k))


@dataclass(frozen=True, repr=False)
class Causal(Window):
    """A query sees itself and what came before."""

    left: int | None = None
    right: int | None = 0

    def __repr__(self) -> str:
        return "Causal()"


@dataclass(frozen=True, repr=False)
class Sinks(Pattern):
    """The first `n` keys, seen from everywhere (also from before them: `& Causal()` if not)."""

    n: int

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return (i == i) & (j < self.n)

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        seen = normalize([(0, self.n)], n_k)
        return KeyRanges(seen, seen)


@dataclass(frozen=True, repr=False)
class Dilated(Pattern):
    """Keys at multiples of `step` from the query, on both sides."""

    step: int

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"Dilated(step={self.step}): give a step of 1 or more")

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return (i - j) % self.step == 0

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        everything: Ranges = ((0, n_k),)
        return KeyRanges(everything, everything if self.step == 1 else ())


class _ByBatch(Pattern):
    """A pattern held as a tensor with one row for each sequence of the batch."""

    def _row(self, table: Tensor, batch: Tensor | None, at: Tensor) -> Tensor:
        """table[batch, at], where a table of one row serves every sequence."""
        table = table.to(at.device)
        if table.shape[0] == 1:
            return table[0][at]
        if batch is None:
            raise ValueError(
                f"{type(self).__name__} holds {table.shape[0]} sequences: say which with batch="
            )
        return table[batch, at]


@dataclass(frozen=True, eq=False, repr=False)
class Documents(_ByBatch):
    """Packed sequences: a query sees the keys of its own document. ids `(n,)` or `(batch, n)`."""

    ids: Tensor

    @property
    def by_batch(self) -> bool:
        return self._ids.shape[0] > 1

    @cached_property
    def _ids(self) -> Tensor:
        ids = self.ids
        if ids.dim() not in (1, 2) or ids.is_floating_point():
            raise ValueError(
                f"Documents(ids): give integers of shape (n,) or (batch, n), "
                f"not {ids.dtype} of shape {tuple(ids.shape)}"
            )
        return ids[None] if ids.dim() == 1 else ids

    @cached_property
    def _extent(self) -> tuple[list[int], list[int], list[int]]:
        """For each position: first and last position of its document over all sequences,
        and the number of position changes of document before it (to see if a block is one)."""
        ids = self._ids.cpu()
        n = ids.shape[1]
        at = torch.arange(n).expand_as(ids)
        _, inverse = torch.unique(ids, return_inverse=True)
        size = int(inverse.max()) + 1 if n else 0
        first = torch.full((ids.shape[0], size), n).scatter_reduce(1, inverse, at, "amin")
        last = torch.full((ids.shape[0], size), -1).scatter_reduce(1, inverse, at, "amax")
        changes = torch.zeros(n, dtype=torch.long)
        if n > 1:
            changes[1:] = (ids[:, 1:] != ids[:, :-1]).any(0).cumsum(0)
        return (
            first.gather(1, inverse).amin(0).tolist(),
            last.gather(1, inverse).amax(0).tolist(),
            changes.tolist(),
        )

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return self._row(self._ids, batch, i.clamp_min(0)) == self._row(self._ids, batch, j)

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        first, last, changes = self._extent
        start, stop = max(start, 0), max(stop, 1)
        low, high = min(first[start:stop]), max(last[start:stop]) + 1
        # one document without interruption, from its first key to its last
        whole = changes[low] == changes[high - 1] and low <= start and stop <= high
        return KeyRanges(normalize([(low, high)], n_k), ((low, high),) if whole else ())


@dataclass(frozen=True, eq=False, repr=False)
class Padding(Pattern):
    """Keys that are real: the first `lengths[b]` of a sequence, or the last if `left`."""

    lengths: Tensor
    left: bool = False
    n: int | None = None  # number of keys, needed only for padding at the left

    def __post_init__(self) -> None:
        if self.left and self.n is None:
            raise ValueError("Padding(left=True) must know the number of keys: give n=")

    @property
    def by_batch(self) -> bool:
        return self.lengths.numel() > 1

    @cached_property
    def _extent(self) -> Range:
        return int(self.lengths.min()), int(self.lengths.max())

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        lengths = self.lengths.to(j.device).reshape(-1)
        if lengths.numel() == 1:
            length = lengths[0]
        elif batch is None:
            raise ValueError(f"Padding holds {lengths.numel()} sequences: say which with batch=")
        else:
            length = lengths[batch]
        real = j >= self.n - length if self.left and self.n is not None else j < length
        return (i == i) & real

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        short, long = self._extent
        if self.left:
            return KeyRanges(
                normalize([(n_k - long, n_k)], n_k), normalize([(n_k - short, n_k)], n_k)
            )
        return KeyRanges(normalize([(0, long)], n_k), normalize([(0, short)], n_k))


@dataclass(frozen=True, eq=False, repr=False)
class KeyMask(_ByBatch):
    """Keys that may be seen by everybody, as a boolean `(n_k,)` or `(batch, n_k)`."""

    keys: Tensor

    @property
    def by_batch(self) -> bool:
        return self._keys.shape[0] > 1

    @cached_property
    def _keys(self) -> Tensor:
        if self.keys.dtype != torch.bool or self.keys.dim() not in (1, 2):
            raise ValueError(
                f"KeyMask(keys): give booleans of shape (n_k,) or (batch, n_k), "
                f"not {self.keys.dtype} of shape {tuple(self.keys.shape)}"
            )
        return self.keys[None] if self.keys.dim() == 1 else self.keys

    @cached_property
    def _runs(self) -> KeyRanges:
        return KeyRanges(runs(self._keys.any(0), sure=False), runs(self._keys.all(0), sure=True))

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return (i == i) & self._row(self._keys, batch, j)

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        return self._runs


def runs(mask: Tensor, *, sure: bool) -> Ranges:
    """Runs of True in a boolean vector; if there are too many, one range that errs safely."""
    edges = torch.diff(mask.cpu().int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts = (edges > 0).nonzero()[:, 0].tolist()
    stops = (edges < 0).nonzero()[:, 0].tolist()
    if len(starts) > MAX_RUNS:
        return () if sure else ((starts[0], stops[-1]),)
    return tuple(zip(starts, stops, strict=True))


@dataclass(frozen=True, eq=False, repr=False)
class Mask(Pattern):
    """Any mask, taken as it is: boolean, broadcastable to `(batch, heads, n_q, n_k)`."""

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.dtype != torch.bool or self.table.dim() != 4:
            raise ValueError(
                f"Mask(table): give booleans of shape (batch or 1, heads or 1, n_q, n_k), True = "
                f"may look, not {self.table.dtype} of shape {tuple(self.table.shape)}"
            )

    @property
    def by_batch(self) -> bool:
        return self.table.shape[0] > 1

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        b_size, h_size, n_q, n_k = self.table.shape
        zero = torch.zeros((), dtype=torch.long, device=i.device)
        b = zero if b_size == 1 or batch is None else batch
        h = zero if h_size == 1 or head is None else head
        return self.table.to(i.device)[b, h, i - (n_k - n_q), j]


@dataclass(frozen=True, eq=False, repr=False)
class Predicate(Pattern):
    """A function `(batch, head, i, j) -> bool tensor` of broadcasting index tensors."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    by_batch_row: bool = True

    @property
    def by_batch(self) -> bool:
        return self.by_batch_row

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        zero = torch.zeros((), dtype=torch.long, device=i.device)
        b = zero if batch is None else batch
        h = zero if head is None else head
        out = self.function(b, h, i, j)
        return out.expand(torch.broadcast_shapes(out.shape, i.shape, j.shape))


@dataclass(frozen=True, eq=False, repr=False)
class And(Pattern):
    """Allowed by both."""

    a: Pattern
    b: Pattern

    @property
    def by_batch(self) -> bool:
        return self.a.by_batch or self.b.by_batch

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return self.a.allowed(i, j, batch, head) & self.b.allowed(i, j, batch, head)

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        return self.a.ranges(start, stop, n_k).both(self.b.ranges(start, stop, n_k))

    def __repr__(self) -> str:
        return f"({self.a!r} & {self.b!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Or(Pattern):
    """Allowed by one or the other."""

    a: Pattern
    b: Pattern

    @property
    def by_batch(self) -> bool:
        return self.a.by_batch or self.b.by_batch

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return self.a.allowed(i, j, batch, head) | self.b.allowed(i, j, batch, head)

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        return self.a.ranges(start, stop, n_k).either(self.b.ranges(start, stop, n_k), n_k)

    def __repr__(self) -> str:
        return f"({self.a!r} | {self.b!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Not(Pattern):
    """Allowed where `of` does not allow."""

    of: Pattern

    @property
    def by_batch(self) -> bool:
        return self.of.by_batch

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        return ~self.of.allowed(i, j, batch, head)

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        return self.of.ranges(start, stop, n_k).neither(n_k)

    def __repr__(self) -> str:
        return f"~{self.of!r}"


def both(a: Pattern, b: Pattern) -> Pattern:
    """`a & b`, with the cases that a kernel knows kept recognisable (two bands are a band)."""
    if isinstance(a, Full):
        return b
    if isinstance(b, Full):
        return a
    if isinstance(a, Window) and isinstance(b, Window):
        left = min((w.left for w in (a, b) if w.left is not None), default=None)
        right = min((w.right for w in (a, b) if w.right is not None), default=None)
        return Causal() if (left, right) == (None, 0) else Window(left, right)
    return And(a, b)


def either(a: Pattern, b: Pattern) -> Pattern:
    """`a | b`; Full swallows the other."""
    if isinstance(a, Full) or isinstance(b, Full):
        return Full()
    return Or(a, b)
