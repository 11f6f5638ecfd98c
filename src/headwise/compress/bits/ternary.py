"""Linear layers trained to have weights of two or three values.

    two     w = beta * sign(W - mean W)             BitNet, arXiv 2310.11453, eq. 1 to 3, 12
    three   w = beta * clip(round(W / beta), -1, 1)     b1.58, arXiv 2402.17764, eq. 1 to 3

with beta = mean |W|. Tokens are normalised and rounded to 8 bits, each by itself. The float W is
what is trained: gradients pass straight through both roundings. Matrices like this are trained,
not made: a float model that is rounded so is of no use until it has been trained again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.compress.step import Step, take
from headwise.compress.structure.matrices import (
    bias_of,
    matrices_of,
    named_matrix,
    put_in_place,
    shape_of,
    tied_elsewhere,
)
from headwise.instruments.examples import model_view
from headwise.models import ModelView
from headwise.models.projections import features_first

__all__ = ["LEVELS", "BitLinear", "BitLinears", "few_values", "straight_through", "to_bit_linear"]

LEVELS = (2, 3)


class BitLinear(nn.Module):
    """y = x W^T + b for tokens `(..., in)` with W of `levels` values and tokens of 8 bits, in
    floats that take these values only, so that it trains.

    `norm`: tokens are normalised before (mean 0, variance 1, no parameters), as the papers have
    it; then nothing has to normalise them before. `weight` `(out, in)`: the latent floats;
    `effective_weight()`: what is multiplied with.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        levels: int = 3,
        bias: bool = False,
        norm: bool = True,
        **where: Any,
    ) -> None:
        super().__init__()
        _check_levels(levels)
        self.in_features, self.out_features = in_features, out_features
        self.levels, self.norm = levels, norm
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **where))
        self.bias = nn.Parameter(torch.zeros(out_features, **where)) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def codes(self) -> tuple[Tensor, Tensor]:
        """The weight as -1, (0,) 1 `(out, in)` and its scale `()`."""
        return few_values(self.weight, self.levels)

    def effective_weight(self) -> Tensor:
        """`(out, in)`, with the gradient of the latent weight."""
        codes, scale = self.codes()
        return straight_through(self.weight, codes * scale)

    def forward(self, x: Tensor) -> Tensor:
        x = normalised(x) if self.norm else x
        largest = x.detach().abs().amax(-1, keepdim=True)
        step = torch.where(largest > 0, largest / 127, 1.0)
        tokens = straight_through(x, (x / step).round() * step)
        return F.linear(tokens, self.effective_weight(), self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, levels={self.levels}, "
            f"bias={self.bias is not None}, norm={self.norm}"
        )


def few_values(weight: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """A weight of any shape to codes -1, 1 (or -1, 0, 1) of its type, and a scale `()`."""
    _check_levels(levels)
    latent = weight.detach()
    scale = latent.abs().mean().clamp_min(1e-12)
    if levels == 3:
        return (latent / scale).round().clamp(-1, 1), scale
    ones = torch.ones_like(latent)
    return torch.where(latent > latent.mean(), ones, -ones), scale


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x (Bengio et al. 2013, arXiv 1308.3432)."""
    return rounded.detach() + (x - x.detach())


def normalised(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 of each token."""
    return F.layer_norm(x, x.shape[-1:])


@dataclass(frozen=True)
class BitLinears(Step):
    """BitLinear modules in the places of matrices, with their weights as latent ones."""

    modules: tuple[str, ...]
    levels: int = 3
    norm: bool = True

    def apply(self, model: nn.Module) -> None:
        _check_levels(self.levels)
        found = []
        for name in self.modules:
            matrix = named_matrix(model, name)
            if (other := tied_elsewhere(model, matrix)) is not None:
                raise ValueError(f"{name} shares its weight with {other}: untie them first")
            found.append(matrix)
        for matrix in found:
            out, wide = shape_of(matrix)
            table, bias = features_first(matrix), bias_of(matrix)
            where: dict[str, Any] = {"device": table.device, "dtype": table.dtype}
            made = BitLinear(wide, out, self.levels, bias is not None, self.norm, **where)
            with torch.no_grad():
                made.weight.copy_(table)
            if isinstance(bias, nn.Parameter):
                made.bias = bias
            put_in_place(model, matrix, made.train(matrix.training))


def to_bit_linear(
    model: nn.Module | ModelView,
    which: str | Iterable[str] = "all",
    levels: int = 3,
    norm: bool = True,
) -> BitLinears:
    """Put BitLinear in the place of linear layers, so that the model can be trained with weights
    of few values; in place, before optimisers are made. Returns the step that was taken.

    which: "all" in the layers, "attention", "mlp", or names. levels: 2 or 3. norm: whether each
    normalises its tokens. Raises ValueError for what cannot be, before anything is changed.
    """
    view = model_view(model)
    step = BitLinears(tuple(matrices_of(view, which)), levels, norm)
    take(view.model, step)
    return step


def _check_levels(levels: int) -> None:
    if levels not in LEVELS:
        raise ValueError(f"levels={levels!r}: expected 2 (signs) or 3 (signs and zero)")
