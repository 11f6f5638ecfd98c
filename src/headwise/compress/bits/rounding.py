"""Weights rounded to the nearest of a few values: the codes, and what they stand for.

    8 bits, symmetric    w ~ scale * code            code from -127 to 127 (int8)
    less,   asymmetric   w ~ scale * (code - zero)   code and zero from 0 to 2 ** bits - 1 (uint8)

One scale (and one zero) for every group of neighbours in a row, or for the whole row. Zero is
always one of the values, so that what was pruned stays pruned. A weight moves by half a scale at
most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BITS", "Rounded", "check_group", "round_to_nearest", "rounded"]

BITS = (8, 4, 3, 2)
"""Widths that modules can hold; `rounded` takes every width from 1 to 8."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """codes `(out, in)` int8 (8 bits) or uint8; scale `(out, groups)` float32; zero `(out, groups)`
    uint8, None for 8 bits."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(out, in)`: what the codes stand for."""
        steps = self.codes if self.zero is None else centred(self.codes, self.zero)
        scale = self.scale.double() if dtype == torch.float64 else self.scale
        return scaled(steps, scale, dtype)


def round_to_nearest(weight: Tensor, bits: int, group: int | None = None) -> Rounded:
    """Codes of a weight `(out, in)`. `group`: weights of a row that share a scale, None: all.

    Raises ValueError for bits outside of 1 to 8 and for groups that do not divide the row.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits!r}: expected 1 to 8")
    size = check_group(weight.shape[1], group)
    lines = weight.detach().float().unflatten(1, (-1, size))
    if bits == 8:
        largest = lines.abs().amax(-1)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        codes = (lines / scale[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        return Rounded(codes.flatten(1), scale, None, bits)
    top = 2**bits - 1
    least, largest = lines.amin(-1).clamp_max(0), lines.amax(-1).clamp_min(0)
    scale = torch.where(largest > least, (largest - least) / top, 1.0)
    zero = (-least / scale).round()
    steps = (lines / scale[..., None]).round_() + zero[..., None]
    codes = steps.clamp_(0, top).to(torch.uint8)
    return Rounded(codes.flatten(1), scale, zero.to(torch.uint8), bits)


def rounded(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """The weight `(out, in)` as it is after a round trip through `bits` bits, in its own type."""
    return round_to_nearest(weight, bits, group).weight(weight.dtype)


def centred(codes: Tensor, zero: Tensor) -> Tensor:
    """code - zero as int8, for codes `(rows, in)` and zeros `(rows, groups)` of up to 7 bits."""
    groups = zero.shape[1]
    lines = codes.view(torch.int8).unflatten(1, (groups, codes.shape[1] // groups))
    return (lines - zero.view(torch.int8)[..., None]).flatten(1)


def scaled(steps: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale * step in `dtype`; some rows are as good as all. steps `(rows, in)` int8."""
    groups = scale.shape[1]
    lines = steps.unflatten(1, (groups, steps.shape[1] // groups)).to(scale.dtype)
    return lines.mul_(scale[..., None]).flatten(1).to(dtype)


def check_group(width: int, group: int | None) -> int:
    """The number of weights that share a scale. Raises ValueError where it does not divide."""
    if group is None:
        return width
    if group < 1 or width % group:
        raise ValueError(
            f"group={group} does not divide rows of {width} weights; expected a divisor, or None "
            "for one scale a row"
        )
    return group
