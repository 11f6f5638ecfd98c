"""Groups of query heads of unequal size, laid out as if they were equal.

Where heads were pruned one by one, key-value head k is read by as many query heads as are left of
its group (`structure.groups`). Rows of a block are attended to together, so a smaller group asks
one of its queries several times; what that gives is left out again. A policy sees those queries as
often as they are asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnequalGroups:
    """of: for each query head the key-value head that it reads, ascending."""

    of: tuple[int, ...]

    @cached_property
    def asked(self) -> list[int]:
        """`kv_heads * largest group` numbers of query heads, group after group."""
        groups = [[h for h, k in enumerate(self.of) if k == kv] for kv in sorted(set(self.of))]
        size = max(map(len, groups))
        return [h for group in groups for h in [*group, *[group[-1]] * (size - len(group))]]

    def spread(self, heads: Tensor, dim: int = 1) -> Tensor:
        """Something for every query head, along `dim`, in equal groups."""
        return heads.index_select(dim, _index(self.asked, heads))

    def gather(self, spread: Tensor, dim: int = 1) -> Tensor:
        """Of equal groups, along `dim`, what belongs to each query head."""
        places = [self.asked.index(head) for head in range(len(self.of))]
        return spread.index_select(dim, _index(places, spread))

    def repeat(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Something for every key-value head, along `dim`, for every query head."""
        return rows.index_select(dim, _index(list(self.of), rows))


def _index(places: list[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)
