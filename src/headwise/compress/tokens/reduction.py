"""How patches are made fewer: what a way of doing it answers, and those that rank patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from headwise.compress.tokens.sight import Sight


class Reduction(ABC):
    """A way to make fewer tokens out of patches. Subclasses are frozen dataclasses of settings.

    `place`: where in a layer tokens go if nothing else is said: "before" it, in the "middle"
    (between attention and MLP, so that the MLP works on fewer already) or "after" it. `needs_map`:
    whether it reads queries, keys and values at all. `needs_class`: whether it asks for a class
    token. `watches`: whether `observe` is asked in every
    layer up to the last reduction. `proportional`: whether keys of later layers count by the
    number of patches in them (ToMe, arXiv 2210.09461, eq. 1).
    """

    place: ClassVar[str] = "middle"
    needs_map: ClassVar[bool] = True
    needs_class: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    proportional: bool = False

    @abstractmethod
    def __call__(self, tokens: Tensor, sight: Sight, k: int) -> tuple[Tensor, Tensor]:
        """Patches `(batch, n, width)` to fewer `(batch, m, width)`, m = k but for tokens that
        are added, and `(batch, n)`: the number of the new token that each old one is in, -1 for
        those that are gone. Never called with k >= n."""

    def observe(self, sight: Sight) -> Tensor | None:
        """What to note about each patch `(batch, patches)`; handed on as `sight.state`."""
        return None

    def count(self, sight: Sight) -> int:
        """How many patches stay where the schedule says None."""
        raise ValueError(
            f"{type(self).__name__} does not choose how many tokens stay: give counts or shares"
        )


class Ranked(Reduction):
    """Keeps the patches of the largest scores, in their order.

    `fuse`: "" drops the rest; "scores" adds one more token, sum_i score_i x_i over the rest
    (EViT); "mean" the mean of the rest by their sizes.
    """

    fuse: str = ""

    @abstractmethod
    def scores(self, sight: Sight) -> Tensor:
        """`(batch, patches)`, larger = keep."""

    def __call__(self, tokens: Tensor, sight: Sight, k: int) -> tuple[Tensor, Tensor]:
        scores = self.scores(sight)
        kept = highest(scores, k)
        groups = groups_of(kept, tokens.shape[1])
        small = gathered(tokens, kept)
        if not self.fuse:
            return small, groups
        weights = scores if self.fuse == "scores" else sight.sizes
        weights = torch.where(groups < 0, weights, torch.zeros_like(weights)).to(tokens.dtype)
        if self.fuse == "mean":
            weights = weights / weights.sum(1, keepdim=True)
        rest = weights[:, None] @ tokens
        return torch.cat([small, rest], 1), torch.where(groups < 0, k, groups)


def highest(scores: Tensor, k: int) -> Tensor:
    """Where the k largest scores are `(batch, k)`, in the order of the patches."""
    return scores.detach().topk(k, 1).indices.sort(1).values


def groups_of(kept: Tensor, n: int) -> Tensor:
    """For each of n patches its place among the kept `(batch, k)`, -1 for the others."""
    groups = kept.new_full((len(kept), n), -1)
    places = torch.arange(kept.shape[1], device=kept.device)
    return groups.scatter_(1, kept, places.expand_as(kept))


def gathered(tokens: Tensor, kept: Tensor) -> Tensor:
    """Tokens `(batch, n, ...)` at places `(batch, k)`."""
    index = kept.reshape(*kept.shape, *(1,) * (tokens.dim() - 2))
    return tokens.gather(1, index.expand(*kept.shape, *tokens.shape[2:]))


def joined(values: Tensor, groups: Tensor, m: int, how: str = "sum") -> Tensor:
    """Values `(batch, n)` or `(batch, n, width)` put together by group: `(batch, m, ...)`.

    `how`: sum or amax. Those of groups -1 count nowhere.
    """
    index = torch.where(groups < 0, m, groups)
    shape = (len(values), m + 1, *values.shape[2:])
    index = index.reshape(*index.shape, *(1,) * (values.dim() - 2)).expand_as(values)
    start = values.new_zeros(shape) if how == "sum" else values.new_full(shape, -torch.inf)
    return start.scatter_reduce(1, index, values, how)[:, :m]
