"""What a cache was told: the same for all of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from headwise.compress.cache.budgets import Budget
from headwise.compress.cache.policy import Policy
from headwise.compress.cache.store import Store

Maker = Callable[[Tensor, Tensor, int], Store]
"""Makes a store of keys `(R, n, d)`, values `(R, n, d_v)` and how many entries may come."""


@dataclass(frozen=True)
class Rules:
    """`sinks`, `window`: entries of every row that are always kept, its first and its newest ones.
    `step`: rows keep a multiple of so many entries, so that they share blocks. `slack`: decoded
    tokens between two evictions, None: as `patience` says. `makers`: what each layer stores its
    entries in."""

    policy: Policy
    budget: Budget
    sinks: int
    window: int
    step: int
    slack: int | None
    makers: tuple[Maker, ...]

    @property
    def observes(self) -> bool:
        """Whether the policy notes something of the entries as queries come."""
        return type(self.policy).observe is not Policy.observe

    def patience(self, entries: int) -> int:
        """Tokens decoded between two evictions of a layer whose longest row has so many entries:
        an eviction moves them all, so where nothing else was said it may be a 32nd of them."""
        return max(64, entries // 32) if self.slack is None else self.slack

    def rounded(self, count: int) -> int:
        """Up to the next multiple of `step`."""
        return -(-count // self.step) * self.step
