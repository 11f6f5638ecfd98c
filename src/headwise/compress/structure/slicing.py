"""Projections with fewer features: real tensors, cut in place, on any device, "meta" included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headwise.compress.structure.low_rank import LowRank
from headwise.compress.structure.recalled import is_lent
from headwise.models.errors import UnsupportedModelError

_COUNTS = {"rows": ("out_features", "nf"), "columns": ("in_features", "nx")}


def check_sliceable(module: nn.Module, where: str) -> None:
    """Raises UnsupportedModelError for what holds no float matrix that could be cut."""
    if is_lent(module):
        raise UnsupportedModelError(
            f"{where}: a later layer shares its map, which has as many heads: take heads out "
            "first, and share maps afterwards"
        )
    for part in (module.up, module.down) if isinstance(module, LowRank) else (module,):
        if "weight" not in part._parameters:
            raise UnsupportedModelError(
                f"{where}: a {type(part).__name__} cannot be cut: take heads and channels out "
                "first, and change the matrices that stay afterwards"
            )


def keep_rows(module: nn.Module, rows: Sequence[int]) -> None:
    """Keep these output features of a Linear, Conv1D or LowRank, in this order, and their bias."""
    if isinstance(module, LowRank):
        keep_rows(module.up, rows)
        module.out_features = len(rows)
        return
    _cut(module, "weight", rows, 1 if hasattr(module, "nf") else 0)
    if isinstance(getattr(module, "bias", None), Tensor):
        _cut(module, "bias", rows, 0)
    _count(module, "rows", len(rows))


def keep_columns(module: nn.Module, columns: Sequence[int]) -> None:
    """Keep these input features, in this order; the bias stays."""
    if isinstance(module, LowRank):
        keep_columns(module.down, columns)
        module.in_features = len(columns)
        return
    _cut(module, "weight", columns, 0 if hasattr(module, "nf") else 1)
    _count(module, "columns", len(columns))


def keep_along(module: nn.Module, name: str, kept: Sequence[int], axis: int) -> None:
    """Keep some of a parameter or buffer along one axis."""
    _cut(module, name, kept, axis)


def add_bias(module: nn.Module, features: int) -> None:
    """Give a projection a bias of zeros, if it has none."""
    if isinstance(module, LowRank):
        module = module.up
    if isinstance(getattr(module, "bias", None), Tensor):
        return
    weight = module.weight
    assert isinstance(weight, Tensor)
    zeros = torch.zeros(features, dtype=weight.dtype, device=weight.device)
    module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def _cut(module: nn.Module, name: str, kept: Sequence[int], axis: int) -> None:
    whole = getattr(module, name)
    index = torch.tensor(list(kept), dtype=torch.long, device=whole.device)
    part = whole.detach().index_select(axis, index)
    if name in module._parameters:
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
    else:
        setattr(module, name, part)


def _count(module: nn.Module, side: str, count: int) -> None:
    for name in _COUNTS[side]:
        if hasattr(module, name):
            setattr(module, name, count)
