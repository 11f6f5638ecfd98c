"""What a model is told about places, as an input of its own that receives relevance.

PA-LRP (Bakish et al. 2025, "Revisiting LRP", arXiv 2506.02138): an input is a pair of a token and
its position, and relevance that reaches a positional encoding stays there instead of being lost.

    added to tokens (learned, sinusoidal)   shared out like every sum: p x gradient
    rotary                                  a product of queries (keys) with cosines and sines, half
                                            to each; over all heads and layers together
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models import ModelView, UnsupportedModelError
from headwise.models.backbones.grid import GridPositions
from headwise.parts.position.absolute import Learned, Sinusoidal
from headwise.parts.position.rotary import Rotary

__all__ = ["Positions"]


class Positions:
    """The positional encodings of one stack, each replaced by a leaf of the graph while `telling`.

    `leaves`: filled while the model runs, `(batch, ..., n, d)` each.

    Raises UnsupportedModelError where none was found: relative biases, and positions that are no
    module, table or parameter of their own.
    """

    def __init__(self, view: ModelView, stack: str, batch: int) -> None:
        self.leaves: list[Tensor] = []
        self.added: dict[int, Callable[[], Tensor]] = {}
        self._batch, self._width = batch, view.width
        several = len(view.stacks) > 1
        whole = view.owners[stack] if several else view.model
        self._rotary: list[nn.Module] = []
        self._tables: list[nn.Module] = []
        self._wheels: list[Rotary] = []
        self._adders: list[Any] = []
        for name, module in whole.named_modules():
            self._sort(name.rsplit(".", 1)[-1].lower(), module)
        for name, parameter in whole.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if "pos" in last and parameter.dim() == 3 and parameter.shape[-1] == view.width:
                self.added[id(parameter)] = partial(self._leaf, parameter)
        if not any((self._rotary, self._tables, self._wheels, self._adders, self.added)):
            raise UnsupportedModelError(
                f"no positional encoding of {type(view.model).__name__} was found that could "
                "receive relevance: looked for rotary modules, tables named pos or wpe that are "
                "added to tokens, and the positions of headwise.parts"
            )

    def _sort(self, name: str, module: nn.Module) -> None:
        if isinstance(module, Rotary):
            self._wheels.append(module)
        elif isinstance(module, Learned | Sinusoidal | GridPositions):
            self._adders.append(module)
        elif "rotary" in type(module).__name__.lower():
            self._rotary.append(module)
        elif isinstance(module, nn.Embedding) and _says_place(name):
            self._tables.append(module)

    @contextmanager
    def telling(self) -> Iterator[None]:
        self.leaves.clear()
        handles: list[Any] = []
        patched: list[tuple[nn.Module, str]] = []
        try:
            for module in self._rotary:
                handles.append(module.register_forward_hook(self._turned))
            for module in self._tables:
                handles.append(module.register_forward_hook(self._looked_up))
            for wheel in self._wheels:
                patched.append((wheel, "wheel"))
                wheel.wheel = partial(self._wheel, wheel.wheel)  # type: ignore[method-assign]
            for adder in self._adders:
                name = "forward" if isinstance(adder, GridPositions) else "embed"
                patched.append((adder, name))
                setattr(adder, name, partial(self._sum, getattr(adder, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, name in patched:
                delattr(module, name)

    def by_position(self, leaf: Tensor, grad: Tensor | None) -> Tensor:
        """`(batch, n)`: relevance of a leaf."""
        found = (leaf * (torch.zeros_like(leaf) if grad is None else grad)).detach()
        return found.movedim(-2, 1).flatten(2).sum(-1)

    def _leaf(self, value: Tensor) -> Tensor:
        value = value.detach()
        if value.dim() == 2:
            value = value[None]
        leaf = value.expand(self._batch, *value.shape[1:]).clone().requires_grad_(True)
        self.leaves.append(leaf)
        return leaf

    def _turned(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list) or any(t.dim() < 3 for t in output):
            raise UnsupportedModelError(
                f"{type(module).__name__} gives no pair of cosines and sines (batch, n, d), so its "
                "relevance cannot be told by position"
            )
        return type(output)([self._leaf(t) for t in output])

    def _looked_up(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._leaf(output) if output.shape[-1] == self._width else None

    def _wheel(self, wheel: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
        return self._leaf(wheel(*args, **more))

    def _sum(self, add: Callable[..., Tensor], x: Tensor, *args: Any, **more: Any) -> Tensor:
        with torch.no_grad():
            places = add(torch.zeros_like(x), *args, **more)
        return x + self._leaf(places)


def _says_place(name: str) -> bool:
    return ("pos" in name or name == "wpe") and "rel" not in name
