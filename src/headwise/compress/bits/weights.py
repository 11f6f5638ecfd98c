"""`quantise`: the linear layers of a model in 8, 4, 3 or 2 bits, with the float weights gone.

Rounding is to the nearest. torchao's tensors do the same, but cannot be written to safetensors
as they are, and were slower here on a CPU (`bench/shrink_weights.py` shows both), so codes are
plain buffers of a plain module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from headwise.compress.bits.quantised_linear import QuantisedLinear, check_form
from headwise.compress.bits.rounding import Rounded, round_to_nearest
from headwise.compress.step import Step, take
from headwise.compress.structure.matrices import (
    bias_of,
    is_matrix,
    matrices_of,
    named_matrix,
    put_in_place,
    shape_of,
    tied_elsewhere,
)
from headwise.instruments.examples import model_view
from headwise.models import ModelView
from headwise.models.projections import features_first

__all__ = ["Quantise", "quantise", "widths_of"]


@dataclass(frozen=True)
class Quantise(Step):
    """Empty QuantisedLinear modules in the places of matrices. widths: (name, bits) pairs; group
    and activations as in `quantise`."""

    widths: tuple[tuple[str, int], ...]
    group: int | None = None
    activations: str = "float"

    def apply(self, model: nn.Module) -> None:
        found = []
        for name, bits in self.widths:
            matrix = named_matrix(model, name)
            out, wide = shape_of(matrix)
            try:
                check_form(wide, bits, self.group, self.activations)
            except ValueError as error:
                raise ValueError(f"{name} ({out} x {wide}): {error}") from None
            if (other := tied_elsewhere(model, matrix)) is not None:
                raise ValueError(
                    f"{name} shares its weight with {other}: codes in one place would leave the "
                    "floats in the other, and save nothing; untie them first, or leave it out"
                )
            found.append((matrix, bits))
        for matrix, bits in found:
            out, wide = shape_of(matrix)
            weight, bias = features_first(matrix), bias_of(matrix)
            made = QuantisedLinear(
                wide,
                out,
                bits,
                self.group,
                bias is not None,
                self.activations,
                device=weight.device,
                dtype=weight.dtype,
            ).train(matrix.training)
            if isinstance(bias, nn.Parameter):
                made.bias = bias
            put_in_place(model, matrix, made)


def quantise(
    model: nn.Module | ModelView,
    bits: int | Mapping[str, int | None] = 8,
    group: int | None = None,
    activations: str = "float",
) -> Quantise:
    """Round weights of linear layers to the nearest of 2 ** bits values, in place; the float
    weights are gone afterwards. Returns the step that was taken.

        quantise(model, bits=8, activations="int8")                # fastest
        quantise(model, bits={"model.layers.0": 8, "model.layers.1.mlp": 4}, group=64)

    bits: 8, 4, 3 or 2, for all matrices in the layers (embeddings and the output layer stay as they
    are); or by name: of matrices, or of modules that hold some, where the longer name wins and
    None means to leave it. group: neighbours in a row that share a scale, which must divide every
    row; None: the row. activations: "float", or "int8": tokens are rounded to 8 bits as well, each
    by itself, and products are of integers: several times as fast on a CPU ("float" saves bytes
    and costs time).

    Raises ValueError, before anything is changed, for names, widths and groups that cannot be, and
    for weights that are shared with another module (tied).
    """
    widths = widths_of(model, bits)
    if not widths:
        raise ValueError("bits names no matrix to be quantised")
    target = model.model if isinstance(model, ModelView) else model
    step = Quantise(tuple(widths.items()), group, activations)
    for name, wide in widths.items():  # all of it is looked at before anything is computed
        check_form(shape_of(named_matrix(target, name))[1], wide, group, activations)
    made: dict[str, Rounded] = {}
    with torch.no_grad():
        for name, wide in widths.items():
            weight = features_first(named_matrix(target, name))
            if not bool(weight.isfinite().all()):
                raise ValueError(f"{name} holds numbers that are not finite: nothing to round to")
            made[name] = round_to_nearest(weight, wide, group)
        take(target, step)
        for name in widths:
            layer = target.get_submodule(name)
            assert isinstance(layer, QuantisedLinear)
            layer.fill(made.pop(name))
    return step


def widths_of(model: nn.Module | ModelView, bits: int | Mapping[str, int | None]) -> dict[str, int]:
    """Matrix name -> bits, as `quantise` reads its argument. Raises ValueError for names that the
    model does not have, or that hold no matrix."""
    if not isinstance(bits, Mapping):
        view = model_view(model)
        found = matrices_of(view)
        return {n: bits for n, m in found.items() if tied_elsewhere(view.model, m) is None}
    target = model.model if isinstance(model, ModelView) else model
    chosen: dict[str, int | None] = {}
    for name in sorted(bits, key=len):  # longer names are inside of shorter ones
        try:
            module = target.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{type(target).__name__} has no module {name!r}") from None
        inside = [
            f"{name}.{below}".strip(".") for below, m in module.named_modules() if is_matrix(m)
        ]
        if not inside:
            raise ValueError(f"{name} is a {type(module).__name__} and holds no matrix")
        chosen |= dict.fromkeys(inside, bits[name])
    return {name: wide for name, wide in chosen.items() if wide is not None}
