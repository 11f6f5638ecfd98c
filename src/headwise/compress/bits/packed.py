"""BitLinear for inference: eight or four weights to a byte, products of integers, no floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.bits.integers import packed_product, product, token_codes
from headwise.compress.bits.ternary import BitLinear, normalised
from headwise.compress.cache.packing import pack, packed_size, unpack
from headwise.compress.step import Step, take
from headwise.compress.structure.matrices import put_in_place

__all__ = ["PackBits", "PackedBitLinear", "pack_bits"]


class PackedBitLinear(nn.Module):
    """What a trained BitLinear computes, in 1 bit a weight (levels=2) or 2 (levels=3).

    Buffers: `codes` `(out, in / 8 or in / 4)` uint8, rows filled up to whole bytes; `scale` `()`.
    `weight`: scale times codes in floats, made anew each time, which cannot be written into.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        levels: int = 3,
        bias: bool = False,
        norm: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.levels, self.norm = levels, norm
        self.dtype = dtype or torch.get_default_dtype()
        wide = packed_size(in_features, self.bits)
        zeros = torch.zeros(out_features, wide, dtype=torch.uint8, device=device)
        self.register_buffer("codes", zeros)
        self.register_buffer("scale", torch.ones((), device=device))
        made = torch.zeros(out_features, dtype=self.dtype, device=device) if bias else None
        self.bias = nn.Parameter(made, requires_grad=False) if made is not None else None

    @property
    def bits(self) -> int:
        """A weight's."""
        return self.levels - 1

    def fill(self, layer: BitLinear) -> None:
        """Take the weights of a trained layer of the same shape."""
        codes, scale = layer.codes()
        unsigned = (codes + 1) / (2 if self.levels == 2 else 1)
        self.codes.copy_(pack(unsigned.to(torch.uint8), self.bits))
        self.scale.copy_(scale)
        if self.bias is not None and layer.bias is not None:
            self.bias.data.copy_(layer.bias)

    @property
    def weight(self) -> Tensor:
        """`(out, in)` floats."""
        with torch.inference_mode():
            return self._floats(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = normalised(x) if self.norm else x
        made = product(x.reshape(-1, self.in_features), self)
        if self.bias is not None:
            made = made + self.bias
        return made.view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """x `(rows, in)` -> x W^T `(rows, out)`, without the bias."""
        tokens, scale = token_codes(x)
        made = packed_product(tokens, self.codes, self.bits)
        # codes 0 to 2 stand for -1 to 1, codes 0 and 1 for -1 and 1
        made = (3 - self.bits) * made - tokens.sum(-1, keepdim=True, dtype=torch.int32)
        return (made * (scale * self.scale)).to(x.dtype)

    def back(self, gradient: Tensor) -> Tensor:
        """gradient `(rows, out)` -> gradient W `(rows, in)`."""
        return gradient @ self._floats(gradient.dtype)

    def _floats(self, dtype: torch.dtype) -> Tensor:
        codes = unpack(self.codes, self.bits, self.in_features).to(self.scale.dtype)
        return (((3 - self.bits) * codes - 1) * self.scale).to(dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, levels={self.levels}, "
            f"bias={self.bias is not None}, norm={self.norm}"
        )


@dataclass(frozen=True)
class PackBits(Step):
    """Empty PackedBitLinear modules in the places of BitLinear ones."""

    modules: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        found = _named(model, self.modules)
        for name, layer in found.items():
            if not isinstance(layer, BitLinear):
                raise ValueError(f"{name} is a {type(layer).__name__}, expected a BitLinear")
        for layer in found.values():
            assert isinstance(layer, BitLinear)
            made = PackedBitLinear(
                layer.in_features,
                layer.out_features,
                layer.levels,
                layer.bias is not None,
                layer.norm,
                layer.weight.device,
                layer.weight.dtype,
            )
            put_in_place(model, layer, made.train(layer.training))


def pack_bits(model: nn.Module) -> PackBits:
    """Pack every BitLinear of a trained model, in place: the latent floats are gone. Returns the
    step that was taken. Raises ValueError for a model without any."""
    names = tuple(name for name, m in model.named_modules() if isinstance(m, BitLinear))
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no BitLinear to be packed: put some in with to_bit_linear "
            "and train them"
        )
    trained = _named(model, names)
    step = PackBits(names)
    take(model, step)
    for name, layer in trained.items():
        made = model.get_submodule(name)
        assert isinstance(made, PackedBitLinear)
        assert isinstance(layer, BitLinear)
        made.fill(layer)
    return step


def _named(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    try:
        return {name: model.get_submodule(name) for name in names}
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no such module: {error}") from None
