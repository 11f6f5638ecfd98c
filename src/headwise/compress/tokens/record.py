"""What became of the patches in the last forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class Record:
    """Where each original patch is after every layer in which tokens went.

    Holds the last forward pass of the model; empty before the first.
    """

    def __init__(self) -> None:
        self._groups: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._patches: tuple[int, int] | None = None

    def begin(self, batch: int, patches: int) -> None:
        """A forward pass over so many images and patches starts."""
        self._groups, self._counts, self._patches = {}, {}, (batch, patches)

    def note(self, layer: int, groups: Tensor, m: int) -> None:
        """In this layer the tokens so far became m; `groups` `(batch, n)` as reductions say it."""
        groups = groups.detach()
        if self._groups:
            before = self._groups[max(self._groups)]
            after = groups.gather(1, before.clamp_min(0))
            groups = torch.where(before < 0, before, after)
        self._groups[layer], self._counts[layer] = groups, m

    @property
    def counts(self) -> dict[int, int]:
        """Layer -> how many tokens besides those in front it left."""
        return dict(self._counts)

    def kept(self, layer: int) -> Tensor:
        """`(batch, patches)`: which token each original patch is in once this layer is through,
        -1 for patches that are gone. Raises ValueError before the first forward pass."""
        if self._patches is None:
            raise ValueError("nothing is recorded: run the model first")
        done = [at for at in self._groups if at <= layer]
        if not done:
            batch, patches = self._patches
            return torch.arange(patches).expand(batch, patches)
        return self._groups[max(done)]

    def members(self, layer: int, image: int = 0) -> list[list[int]]:
        """The original patches in each token of one image once this layer is through."""
        groups = self.kept(layer)[image].tolist()
        found: list[list[int]] = [[] for _ in range(max(groups, default=-1) + 1)]
        for patch, group in enumerate(groups):
            if group >= 0:
                found[group].append(patch)
        return found
