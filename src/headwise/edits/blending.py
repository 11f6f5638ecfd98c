"""Changes of what heads give: towards the token itself, or along a direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.edits.change import Call, Change
from headwise.models.structure import AttentionView


@dataclass(frozen=True, eq=False)
class TowardsSelf(Change):
    """The map P becomes (1 - u) P + u I: the heads give (1 - u) out + u v, each token's own value
    (SoftPAG: Ahn et al. 2025, arXiv 2506.10978; u = 1 is perturbed-attention guidance, Ahn et al.
    2024, arXiv 2403.17377). No matrix is made. Raises ValueError unless 0 <= u <= 1, and for
    cross-attention, where a token has no value of its own."""

    u: float
    hides_map = True

    def __post_init__(self) -> None:
        if not 0 <= self.u <= 1:
            raise ValueError(f"TowardsSelf({self.u}): give a number between 0 and 1")

    def check(self, attention: AttentionView, heads: tuple[int, ...]) -> None:
        if attention.kind == "cross":
            raise ValueError(
                f"{attention.name} is a cross-attention, in which tokens have no values of their "
                "own: TowardsSelf goes with self-attention"
            )

    def after(self, call: Call, out: Tensor) -> Tensor:
        if self.u == 0:
            return out
        group = out.shape[1] // call.value.shape[1]
        own = call.value[:, :, call.n_k - call.n_q :].repeat_interleave(group, 1)
        return torch.lerp(out, own.to(out.dtype), self.u)


@dataclass(frozen=True, eq=False)
class AddDirection(Change):
    """`strength` times a vector is added to what the heads give, before the output projection, at
    every token (inference-time intervention: Li et al. 2023, arXiv 2306.03341, section 4).

    direction: Tensor `(value_dim,)` for all heads of the selector, or `(heads of the layer,
    value_dim)`. Raises ValueError for another shape.
    """

    direction: Tensor
    strength: float = 1.0

    def check(self, attention: AttentionView, heads: tuple[int, ...]) -> None:
        shape = tuple(self.direction.shape)
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != attention.heads):
            raise ValueError(
                f"AddDirection: a direction of shape {shape} for {attention.name}; give "
                f"(value_dim,), or ({attention.heads}, value_dim)"
            )

    def after(self, call: Call, out: Tensor) -> Tensor:
        vectors = self.direction.to(out)
        vectors = vectors if vectors.dim() == 1 else vectors[list(call.heads), None]
        if vectors.shape[-1] != out.shape[-1]:
            raise ValueError(
                f"AddDirection: {vectors.shape[-1]} numbers for heads of {call.attention.name} "
                f"that give {out.shape[-1]}"
            )
        return out + self.strength * vectors

    def __repr__(self) -> str:
        return f"AddDirection({tuple(self.direction.shape)}, strength={self.strength})"
