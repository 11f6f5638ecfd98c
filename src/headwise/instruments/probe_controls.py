"""What a probe must be held against: labels and features that say nothing.

shuffled   the same features, labels permuted: what chance and the probe's freedom give
task       Hewitt and Liang 2019, arXiv 1909.03368, section 2: every type of token has a label of
           its own, drawn at random by the labels' frequencies; selectivity is the probe's accuracy
           minus the accuracy on this. High only where the probe does not just memorise types
untrained  the same labels, features of the model with the numbers of each weight permuted: what
           an architecture with the same statistics gives without having learned anything
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["CONTROLS", "control_task", "shuffled_labels", "untrained_copy"]

CONTROLS = ("shuffled", "task", "untrained")


def shuffled_labels(labels: Tensor, seed: int) -> Tensor:
    """Labels `(rows,)`, permuted over all rows."""
    random = torch.Generator().manual_seed(seed)
    return labels[torch.randperm(len(labels), generator=random)]


def control_task(labels: Tensor, types: Tensor, seed: int) -> Tensor:
    """A label for each type, drawn by the labels' frequencies; `(rows,)` both.

    Raises ValueError where there are fewer than two types, of which nothing could be learned.
    """
    kinds, which = types.unique(return_inverse=True)
    if len(kinds) < 2:
        raise ValueError(
            "all rows are of one type of token, so the control task has one answer: give types= "
            "(such as the word that the label is about), or controls without 'task'"
        )
    random = torch.Generator().manual_seed(seed)
    drawn = labels[torch.randint(len(labels), (len(kinds),), generator=random)]
    return drawn[which]


def untrained_copy(model: nn.Module, seed: int) -> nn.Module:
    """A copy with the numbers of every weight of two or more axes permuted, so that each keeps its
    mean and spread; vectors (norms, biases) stay. Takes the memory of the model once more."""
    random = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.dim() > 1:
                order = torch.randperm(weight.numel(), generator=random).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return twin
