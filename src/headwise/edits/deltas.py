"""What a patch adds to one parameter: a whole tensor, or the product of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from headwise.models.projections import features_first


class Delta(Protocol):
    """Added to a parameter of `shape`, as that parameter is stored."""

    @property
    def shape(self) -> torch.Size: ...

    def whole(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor that is added, computed in `dtype`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of it, by suffix."""
        ...


@dataclass(frozen=True, eq=False)
class Full:
    """`W + delta`."""

    delta: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.delta.shape

    def whole(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return self.delta.to(device=device, dtype=dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}


@dataclass(frozen=True, eq=False)
class LowRank:
    """`W + left @ right`, with left `(rows, rank)` and right `(rank, columns)`."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != len(self.right):
            raise ValueError(
                f"factors of shapes {tuple(self.left.shape)} and {tuple(self.right.shape)} do not "
                "multiply; expected (rows, rank) and (rank, columns)"
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def whole(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        left, right = (t.to(device=device, dtype=dtype) for t in (self.left, self.right))
        return left @ right

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


def read_delta(tensors: dict[str, Tensor]) -> Delta:
    """Undo `tensors()`. Raises ValueError for suffixes that belong together to nothing."""
    if tensors.keys() == {"delta"}:
        return Full(tensors["delta"])
    if tensors.keys() == {"left", "right"}:
        return LowRank(tensors["left"], tensors["right"])
    raise ValueError(f"a change of one tensor is a delta, or left and right, not {sorted(tensors)}")


def low_rank(module: nn.Module, out: Tensor, into: Tensor) -> LowRank:
    """`out @ into` added to a projection's matrix seen as `(out, in)`: out `(out, rank)`, into
    `(rank, in)`. transformers' Conv1D keeps its weight transposed, and gets it transposed."""
    if features_first(module) is module.weight:
        return LowRank(out.detach(), into.detach())
    return LowRank(into.detach().T.contiguous(), out.detach().T.contiguous())


def added(weight: Tensor, delta: Delta) -> Tensor:
    """The weight with the delta, rounded once: summed in float32, or in float64 for such weights.

    Raises ValueError where the shapes differ.
    """
    if delta.shape != weight.shape:
        raise ValueError(
            f"a change of shape {tuple(delta.shape)} for a weight of shape {tuple(weight.shape)}"
        )
    exact = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(exact) + delta.whole(weight.device, exact)).to(weight.dtype)
