"""A mask as transformers states it: a rule on indices, with offsets; and its pattern.

transformers hands a mask function to whoever builds masks: `(batch, head, query index, key
index) -> bool`, composed of closures. What such a closure means cannot be read off it, but it
can be asked. So a rule is recognised by its answers: neighbours of the diagonal give the
documents (packed sequences, chunks), one long row and the first one give the window. The pattern
that follows is a guess until it has been compared with the rule itself: everywhere for small
masks, on probe rows, probe columns and random pairs for large ones. A rule that fails is taken
as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.maps import Causal, Documents, Full, Mask, Pattern, Predicate, Window

SMALL = 2**18
"""Masks with at most so many entries (over the batch) are compared entry by entry."""

PROBES = 24
"""Rows, and columns, that are compared in larger ones; beside them SMALL random pairs."""


@dataclass(frozen=True, eq=False)
class Rule:
    """`function(batch, head, query index, key index)` over `n_q` queries from `q_offset` and
    `n_k` keys from `kv_offset`, for `batch` sequences.

    Asked in the coordinates of `headwise.maps`: the query of row r is i = r + n_k - n_q, keys
    are j from 0. `vectorised`: whether the function is known to take index tensors.
    """

    function: Callable[..., Any]
    batch: int
    n_q: int
    n_k: int
    q_offset: int = 0
    kv_offset: int = 0
    device: torch.device | str = "cpu"
    vectorised: bool = True

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"Rule({name}, n_q={self.n_q}, n_k={self.n_k})"

    @property
    def shift(self) -> int:
        """How far the queries stand ahead of where alignment at the end puts them. Zero but for
        caches that are longer than what is in them."""
        return self.q_offset - self.kv_offset - (self.n_k - self.n_q)

    def allowed(self, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The rule's answer for broadcasting index tensors in map coordinates."""
        query = i - (self.n_k - self.n_q) + self.q_offset
        return self.absolute(batch, query, j + self.kv_offset)

    def absolute(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The same in the rule's own coordinates, expanded to the broadcast shape."""
        zero = torch.zeros((), dtype=torch.long, device=self.device)
        answer = self.function(batch, zero, query, key)
        shape = torch.broadcast_shapes(batch.shape, query.shape, key.shape)
        return torch.as_tensor(answer, device=self.device).to(torch.bool).expand(shape)

    def one_by_one(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The same for vectors of indices, by vmap: for functions written for single indices."""
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        zero = torch.zeros((), dtype=torch.long, device=self.device)
        with TransformGetItemToIndex():
            answer: Tensor = torch.vmap(self.function, in_dims=(0, None, 0, 0))(
                batch, zero, query, key
            )
        return answer


def recognise(rule: Rule) -> Pattern:
    """The pattern that `rule` is; a Predicate of the rule, or a Mask, where it is none."""
    if rule.n_q == rule.n_k == 1 and rule.vectorised:  # a decoded token and itself
        at = torch.zeros(rule.batch, 1, 1, dtype=torch.long, device=rule.device)
        if bool(rule.absolute(at, at + rule.q_offset, at + rule.kv_offset).all()):
            return Full()
    if not _takes_tensors(rule):
        return Mask(_table(rule))
    try:
        guess = _guess(rule)
    except IndexError:  # a rule that looks things up in a table does not go beyond it
        guess = None
    if guess is not None and agrees(rule, guess):
        return guess
    return Predicate(rule.allowed, by_batch_row=rule.batch > 1)


def agrees(rule: Rule, pattern: Pattern) -> bool:
    """Whether pattern and rule give the same answers (see the module's text for how many)."""
    device = rule.device
    b = torch.arange(rule.batch, device=device)[:, None, None]
    i = torch.arange(rule.n_q, device=device) + (rule.n_k - rule.n_q)
    j = torch.arange(rule.n_k, device=device)

    def same(b: Tensor, i: Tensor, j: Tensor) -> bool:
        zero = torch.zeros((), dtype=torch.long, device=device)
        mine = pattern.allowed(i, j, b)
        return bool((mine == rule.allowed(b, zero, i, j)).all())

    if rule.batch * rule.n_q * rule.n_k <= SMALL:
        return same(b, i[None, :, None], j[None, None, :])
    random = torch.Generator().manual_seed(0)

    def pick(size: int, count: int) -> Tensor:
        return torch.randint(size, (count,), generator=random).to(device)

    def probes(size: int) -> Tensor:
        spread = torch.linspace(0, size - 1, PROBES // 2, device=device).long()
        return torch.cat([spread, pick(size, PROBES - PROBES // 2)])

    rows, columns = i[probes(rule.n_q)], j[probes(rule.n_k)]
    return (
        same(b, rows[None, :, None], j[None, None, :])
        and same(b, i[None, :, None], columns[None, None, :])
        and same(pick(rule.batch, SMALL), i[pick(rule.n_q, SMALL)], j[pick(rule.n_k, SMALL)])
    )


def _takes_tensors(rule: Rule) -> bool:
    """Whether the function may be asked with index tensors: known, or found out by asking."""
    if rule.vectorised:
        return True
    random = torch.Generator().manual_seed(1)
    b, q, k = (
        torch.randint(size, (64,), generator=random).to(rule.device)
        for size in (rule.batch, rule.n_q, rule.n_k)
    )
    q, k = q + rule.q_offset, k + rule.kv_offset
    single = rule.one_by_one(b, q, k)
    try:
        grid = rule.absolute(b[:, None, None], q[None, :, None], k[None, None, :])
    except Exception:  # somebody else's function, written for single indices, may raise anything
        return False
    n = torch.arange(64, device=rule.device)
    return bool((grid[n, n, n] == single).all())


def _table(rule: Rule) -> Tensor:
    """The dense mask `(batch, 1, n_q, n_k)` of a function that takes single indices only."""
    q = torch.arange(rule.n_q, device=rule.device) + rule.q_offset
    k = torch.arange(rule.n_k, device=rule.device) + rule.kv_offset
    b = torch.arange(rule.batch, device=rule.device)
    rows = [
        rule.one_by_one(one.expand(len(q) * len(k)), q.repeat_interleave(len(k)), k.repeat(len(q)))
        for one in b
    ]
    return torch.stack(rows).view(rule.batch, 1, rule.n_q, rule.n_k)


def _guess(rule: Rule) -> Pattern | None:
    """What the rule would be if it were a window inside documents."""
    device, n_k = rule.device, rule.n_k
    at = torch.arange(n_k, device=device) + rule.kv_offset  # keys' positions, in rule coordinates
    b = torch.arange(rule.batch, device=device)[:, None]
    back = rule.absolute(b, at[None, 1:], at[None, :-1])
    ahead = rule.absolute(b, at[None, :-1], at[None, 1:])
    cut = ~(back | ahead)  # neighbours that do not see each other either way
    if bool(cut.all()):
        cut = torch.zeros_like(cut)  # not documents of one, but a window of one
    ids = torch.nn.functional.pad(cut.long().cumsum(1), (1, 0))
    if rule.shift and bool(cut.any()):
        return None
    # the longest document tells the window: its last query how far back, its first how far ahead
    first = max(0, rule.n_k - rule.n_q) if not rule.shift else 0
    sizes = torch.zeros(rule.batch, int(ids.max()) + 1, device=device, dtype=torch.long)
    sizes.scatter_add_(1, ids[:, first:], torch.ones_like(ids[:, first:]))
    row, document = divmod(int(sizes.argmax()), sizes.shape[1])
    mine = (ids[row] == document).nonzero()[:, 0]
    start, stop = int(mine[0]), int(mine[-1]) + 1
    if rule.shift:
        queries = torch.tensor([rule.q_offset, rule.q_offset + rule.n_q - 1], device=device)
    else:
        queries = torch.tensor([max(start, first), stop - 1], device=device) + rule.kv_offset
    seen = rule.absolute(torch.tensor(row, device=device), queries[:, None], at[None, start:stop])
    left = right = None
    places = seen[1].nonzero()[:, 0]
    if len(places) and int(places[0]) > 0:
        left = int(queries[1] - at[start + int(places[0])]) + 1
    if n_k > 1 and not bool(ahead.any()):
        right = 0
    else:
        places = seen[0].nonzero()[:, 0]
        if len(places) and int(places[-1]) < stop - start - 1:
            right = int(at[start + int(places[-1])] - queries[0])
    window = _window(left, right, rule.shift)
    if not bool(cut.any()):
        return window
    return Documents(ids if rule.batch > 1 else ids[0]) & window


def _window(left: int | None, right: int | None, shift: int) -> Pattern:
    """The window in map coordinates, where the query stands `shift` less far along."""
    left = None if left is None else left - shift
    right = None if right is None else right + shift
    if left is None and right is None:
        return Full()
    return Causal() if (left, right) == (None, 0) else Window(left, right)
