"""Passes over a batch that start where the last one was: layer after layer, each runs once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from headwise.compress.structure.moments import body_of, run, stopping
from headwise.instruments.examples import Examples
from headwise.models import ModelView
from headwise.models.prefix import Prefix


class Walk:
    """One batch on its way through the layers of a model.

    `to(n)` makes passes inside of `remembering()` start at layer n (in order of execution): those
    before it give what the last of them gave when it ran, which is all that is kept. reuse=False:
    every pass computes everything (see `can_go_on`). Nobody may change a layer that lies behind.
    """

    def __init__(self, view: ModelView, batch: Examples, reuse: bool = True) -> None:
        self.view, self.batch, self.reuse = view, batch, reuse
        self.at = 0
        self._given: Any = None

    def to(self, number: int) -> None:
        """Go on to layer `number`; never back."""
        if not self.reuse or number <= self.at:
            return
        last = self.view.layers[number - 1].module
        kept: list[Any] = []
        hook = last.register_forward_hook(lambda module, args, output: kept.append(output))
        body = body_of(self.view.model, [layer.module for layer in self.view.layers])
        try:
            with self.remembering(), stopping(last):
                run(body, self.batch)
        finally:
            hook.remove()
        self.at, self._given = number, kept[-1]

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """The layers that lie behind answer from memory."""
        touched: list[nn.Module] = []
        try:
            for layer in self.view.layers[: self.at]:
                layer.module.forward = lambda *args, **kwargs: self._given
                touched.append(layer.module)
            yield
        finally:
            for module in touched:
                del module.forward


def can_go_on(view: ModelView, batch: Examples) -> bool:
    """Whether passes over this model may start late: tried on one example."""
    return len(view.stacks) == 1 and Prefix(view, first_of(batch).given).reuses


def first_of(batch: Examples) -> Examples:
    """The first example of a batch alone."""
    inputs: dict[str, Tensor] = {k: v[:1] if v.dim() else v for k, v in batch.inputs.items()}
    return Examples(inputs, slice(batch.rows.start, batch.rows.start + 1))
