"""Matrices that get a bias."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from headwise.compress.step import Step
from headwise.compress.structure.low_rank import LowRank
from headwise.compress.structure.matrices import is_matrix, shape_of
from headwise.compress.structure.slicing import add_bias


@dataclass(frozen=True)
class AddBias(Step):
    """Give matrices a bias of zeros, by name. One that has a bias keeps it."""

    names: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        found = []
        for name in self.names:
            module = dict(model.named_modules()).get(name)
            if isinstance(module, LowRank):
                module = module.up
            if module is None or not is_matrix(module):
                raise ValueError(f"{name} is no Linear, Conv1D or LowRank of this model")
            found.append(module)
        for module in found:
            add_bias(module, shape_of(module)[0])
