"""A linear layer whose weights are codes of 8, 4, 3 or 2 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.bits.integers import (
    integer_product,
    packed_product,
    product,
    token_codes,
)
from headwise.compress.bits.rounding import BITS, Rounded, centred, check_group, scaled
from headwise.compress.cache.packing import pack, packed_size, unpack

__all__ = ["ACTIVATIONS", "QuantisedLinear"]

ACTIVATIONS = ("float", "int8")

_TILE = 1 << 20
"""Weights that are floats at the same time, at most (or one row)."""


class QuantisedLinear(nn.Module):
    """y = x W^T + b for tokens `(..., in)`, with W held in codes (see `rounding`).

    `activations`: "float" multiplies x as it is with weights that become floats some rows at a
    time (nothing is as large as the float weight was; slower than it); "int8" rounds each token
    to 8 bits and multiplies integers (several times as fast as float32; needs one scale a row,
    group=None, and not 3 bits). `bits`: 8, 4, 3, 2. `group`: weights that share a scale, None for
    a row.

    Buffers: `codes` `(out, in)` int8 for 8 bits, else `(out, in * bits / 8)` uint8 packed; `scale`
    `(out, groups)`; `zero` `(out, groups)` uint8, not for 8 bits. `bias` is a parameter.

    `weight`: the weight in floats, made anew each time it is asked for: it can be read, writing
    into it raises RuntimeError. x gets gradients (straight through where it is rounded), the codes
    get none. Raises ValueError for widths that cannot be.
    """

    scale: Tensor
    codes: Tensor
    zero: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 8,
        group: int | None = None,
        bias: bool = True,
        activations: str = "float",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_form(in_features, bits, group, activations)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group, self.activations = bits, group, activations
        self.dtype = dtype or torch.get_default_dtype()
        groups = in_features // check_group(in_features, group)
        wide = in_features if bits == 8 else packed_size(in_features, bits)
        of_codes = torch.int8 if bits == 8 else torch.uint8
        zeros = {"device": device}
        self.register_buffer("codes", torch.zeros(out_features, wide, dtype=of_codes, **zeros))
        self.register_buffer("scale", torch.ones(out_features, groups, **zeros))
        zero = torch.zeros(out_features, groups, dtype=torch.uint8, **zeros)
        self.register_buffer("zero", None if bits == 8 else zero)
        made = torch.zeros(out_features, dtype=self.dtype, **zeros) if bias else None
        self.bias = nn.Parameter(made, requires_grad=False) if made is not None else None

    def fill(self, rounded: Rounded) -> None:
        """Take these codes, of the layer's own shape, width and groups."""
        if rounded.bits != self.bits or rounded.scale.shape != self.scale.shape:
            raise ValueError(
                f"codes of {rounded.bits} bits and {tuple(rounded.scale.shape)} scales do not fit "
                f"a layer of {self.bits} bits and {tuple(self.scale.shape)}"
            )
        codes = rounded.codes if self.bits == 8 else pack(rounded.codes, self.bits)
        self.codes.copy_(codes)
        self.scale.copy_(rounded.scale)
        if self.zero is not None and rounded.zero is not None:
            self.zero.copy_(rounded.zero)

    @property
    def weight(self) -> Tensor:
        """`(out, in)` floats, a copy that cannot be written into."""
        with torch.inference_mode():
            return self.rows(0, self.out_features, self.dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight as floats."""
        return scaled(self.steps(start, stop), self.scale[start:stop], dtype)

    def steps(self, start: int, stop: int) -> Tensor:
        """Rows of codes less their zeros, int8: weights in units of their scales."""
        codes = self.codes[start:stop]
        if self.zero is None:
            return codes
        codes = unpack(codes, self.bits, self.in_features)
        return centred(codes, self.zero[start:stop])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        made = product(flat, self)
        if self.bias is not None:
            made = made + self.bias
        return made.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """x `(rows, in)` -> x W^T `(rows, out)`, without the bias."""
        if self.activations == "int8":
            return self._integers(x)
        if self.bits == 8 and self.scale.shape[1] == 1 and _has_fast_kernel(x):
            ones = torch.ones(self.out_features, dtype=x.dtype)
            return (torch._weight_int8pack_mm(x, self.codes, ones) * self.scale.t()).to(x.dtype)
        if self.scale.shape[1] == 1 and x.dtype != torch.float16:  # scales after the product
            made = [x @ self.steps(a, b).to(x.dtype).t() for a, b in self._tiles()]
            return (torch.cat(made, 1) * self.scale.t()).to(x.dtype)
        return torch.cat([x @ self.rows(a, b, x.dtype).t() for a, b in self._tiles()], 1)

    def back(self, gradient: Tensor) -> Tensor:
        """gradient `(rows, out)` -> gradient W `(rows, in)`."""
        made = gradient.new_zeros((len(gradient), self.in_features))
        for a, b in self._tiles():
            made = made + gradient[:, a:b] @ self.rows(a, b, gradient.dtype)
        return made

    def _integers(self, x: Tensor) -> Tensor:
        tokens, scale = token_codes(x)
        if self.bits == 8:
            made = integer_product(tokens, self.codes)
        else:
            made = packed_product(tokens, self.codes, self.bits)
        if self.zero is not None:
            made = made - tokens.sum(-1, keepdim=True, dtype=torch.int32) * self.zero.t()
        return (made * scale * self.scale.t()).to(x.dtype)

    def _tiles(self) -> list[tuple[int, int]]:
        step = max(1, _TILE // self.in_features)
        starts = range(0, self.out_features, step)
        return [(a, min(a + step, self.out_features)) for a in starts]

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}, "
            f"bias={self.bias is not None}, activations={self.activations!r}"
        )


def check_form(width: int, bits: int, group: int | None, activations: str) -> None:
    """Raises ValueError for a layer that cannot be."""
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: expected one of {', '.join(map(str, BITS))}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r}: expected one of {', '.join(ACTIVATIONS)}")
    check_group(width, group)
    if activations == "int8" and bits == 3:
        raise ValueError(
            "bits=3 with activations='int8': codes that lie across bytes have no integer product; "
            "expected 8, 4 or 2 bits, or activations='float'"
        )
    if activations == "int8" and group is not None:
        raise ValueError(
            f"group={group} with activations='int8': integers are added up over the whole row, "
            "which has one scale then; leave group out, or take activations='float'"
        )


def _has_fast_kernel(x: Tensor) -> bool:
    # torch's kernel for bfloat16 wins for a few tokens and loses for many
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < len(x) <= 8
