"""Products of small integers: what makes a linear layer of codes fast.

Tokens are rounded to 8 bits each by themselves (x ~ code * scale, scale = largest |x| / 127), and
the codes are multiplied as integers, four to eight times as fast as floats on a CPU that has such
instructions.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Coded", "integer_product", "packed_product", "product", "token_codes"]


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `(rows, in)` to codes `(rows, in)` int8 and scales `(rows, 1)` float32."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (wide / scale).round_().to(torch.int8), scale


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x `(rows, in)` int8, weight `(out, in)` int8 -> x weight^T `(rows, out)` int32, exact.

    CUDA's kernel wants more than 16 rows and multiples of 8: rows are filled up; what does not
    fit otherwise, and devices without a kernel, multiply in float64.
    """
    rows, width = x.shape
    if not rows:
        return x.new_zeros((0, len(weight)), dtype=torch.int32)
    if width == 1:  # torch 2.13's kernel leaves the answer unwritten here
        return x.int() * weight.int().t()
    if x.device.type == "cpu" and _cpu_is_exact():
        return torch._int_mm(x.contiguous(), weight.t())
    if x.is_cuda and width % 8 == 0 and len(weight) % 8 == 0:
        full = max(32, -(-rows // 8) * 8)
        filled = torch.nn.functional.pad(x, (0, 0, 0, full - rows))
        return torch._int_mm(filled, weight.t())[:rows]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return (x.to(wide) @ weight.to(wide).t()).to(torch.int32)


def packed_product(x: Tensor, packed: Tensor, bits: int) -> Tensor:
    """x `(rows, in)` int8 with codes packed by `pack` `(out, in)` -> `(rows, out)` int32, exact.

    Codes that share a byte lie a whole run apart, so each lane of the bytes is a matrix of its own
    that meets its own run of x; the unpacked weight is never put together.
    """
    per, top = 8 // bits, 2**bits - 1
    run = packed.shape[1]
    x = torch.nn.functional.pad(x, (0, per * run - x.shape[1]))
    total: Tensor | None = None
    for lane, part in enumerate(x.split(run, 1)):
        codes = packed if lane == 0 else packed >> (lane * bits)
        made = integer_product(part, (codes & top).view(torch.int8))
        total = made if total is None else total.add_(made)
    assert total is not None
    return total


class Coded(Protocol):
    """A layer of codes: its product, and the product with the weight's transpose."""

    def product(self, x: Tensor) -> Tensor: ...

    def back(self, gradient: Tensor) -> Tensor: ...


def product(x: Tensor, layer: Coded) -> Tensor:
    """`layer.product(x)`, which gives x a gradient (straight through what is rounded) and keeps
    nothing of the float weight for it."""
    if x.requires_grad and torch.is_grad_enabled():
        made: Tensor = _Product.apply(x, layer)
        return made
    return layer.product(x)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Coded) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.back(gradients[0]), None


@cache
def _cpu_is_exact() -> bool:
    """Kernels for CPUs without 8-bit instructions may add pairs in 16 bits, where they overflow."""
    x = torch.full((3, 64), 127, dtype=torch.int8)
    weight = torch.full((32, 64), -127, dtype=torch.int8)
    try:
        return bool((torch._int_mm(x, weight.t()) == -127 * 127 * 64).all())
    except RuntimeError:
        return False
