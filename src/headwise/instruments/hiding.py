"""Positions that nobody may look at, differently in every example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.edits import swap
from headwise.edits.change import Call, Change
from headwise.models import ModelView

__all__ = ["HideKeys", "hidden"]


@dataclass(frozen=True, eq=False)
class HideKeys(Change):
    """No query sees these keys, `(batch, n_k)` True where hidden. A row that then sees nothing
    gives zero."""

    keys: Tensor

    def before(self, call: Call) -> Call:
        if self.keys.shape != (len(call.query), call.n_k):
            raise ValueError(
                f"keys to hide are {tuple(self.keys.shape)}; {call.attention.name} has "
                f"{(len(call.query), call.n_k)}: give (batch, n) of the positions it attends to"
            )
        wall = torch.where(self.keys.to(call.query.device), -torch.inf, 0.0)
        return call.biased(wall[:, None, None].to(call.query.dtype))


@contextmanager
def hidden(view: ModelView, stack: str, keys: Tensor) -> Iterator[None]:
    """While this lasts, nobody sees these positions `(batch, n)` of a stack: not its own layers,
    and, of an encoder, not the decoder that attends to it."""
    change = HideKeys(keys)
    several = len(view.stacks) > 1
    wanted = {
        (a.stack, a.kind, a.layer) if several else a.layer: change
        for a in view.attentions
        if (a.stack == stack) == (a.kind == "self")
    }
    with swap(view.model, wanted):
        yield
