"""Which rows a probe is fitted on, and which it is tested on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Split", "folds_of"]

Split = tuple[Tensor, Tensor]


def folds_of(target: Tensor, example: Tensor, folds: int, seed: int) -> list[Split]:
    """(rows fitted on, rows tested on) for each fold: examples are dealt out in random order, class
    after class where each has one class, so that folds have the same shares of them.

    Raises ValueError for fewer examples (of a class) than folds.
    """
    if folds < 2:
        raise ValueError(f"folds={folds}: expected 2 or more")
    random = torch.Generator().manual_seed(seed)
    examples, which = example.unique(return_inverse=True)
    order = torch.randperm(len(examples), generator=random)
    if not target.is_floating_point() and len(examples) == len(target):
        counts = target.bincount()
        least = int(counts[counts > 0].min())
        if least < folds:
            raise ValueError(
                f"a class has {least} examples, fewer than {folds} folds: give more, or folds="
            )
        mine = torch.empty_like(target)
        mine[which] = target
        order = order[mine[order].argsort(stable=True)]
    if len(examples) < folds:
        raise ValueError(f"{len(examples)} examples do not make {folds} folds")
    part = torch.empty(len(examples), dtype=torch.long)
    part[order] = torch.arange(len(examples)) % folds
    of_row = part[which]
    return [((of_row != k).nonzero()[:, 0], (of_row == k).nonzero()[:, 0]) for k in range(folds)]
