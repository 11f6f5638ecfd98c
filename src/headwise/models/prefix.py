"""Run a model again from a layer on, with what the layers before it gave the last time.

A change at layer l leaves everything below l as it was. So what each layer gave is kept once, and
a run from l on lets the model go through its own forward pass while the layers below l answer from
memory: embedding, masks, rotary tables and the head are the model's own, for any model whose
layers are modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.backbones.stack import Block, Stack
from headwise.models.sites import Site, Write, touching
from headwise.models.structure import ModelView
from headwise.parts.wiring.pre import PreNorm

TOLERANCE = 1e-4
"""Of the largest output: what a run from the last layer on may differ from a whole one."""


class Prefix:
    """What a model gave on some inputs, to run on from any layer, several copies at a time.

        prefix = Prefix(view(model), inputs)
        changed = prefix.run({Site("heads", 3): silence}, copies=8)

    `inputs`: what the model is called with, tensors with samples in front; `labels`, with which a
    model would compute a loss of its own, are left out. `output`: the model's
    answer on them, `(batch, ...)`: logits, or whatever it gives first. `reuses`: whether runs
    start late; False where layers run several times in a pass (ALBERT), where a stack's wiring
    passes on more than the residual, where a module says that it `recalls` an earlier layer, or
    where a trial from the last layer on gave something else (then all is computed each time, and
    is right all the same).

    Keeps `layers x batch x n x width` numbers. Nothing of the model is changed between runs.
    """

    def __init__(self, view: ModelView, inputs: Mapping[str, Any], reuse: bool = True) -> None:
        self.view = view
        self.inputs = {key: value for key, value in inputs.items() if key != "labels"}
        known = inspect.signature(view.model.forward).parameters
        if "use_cache" in known:
            self.inputs.setdefault("use_cache", False)
        self.batch = next(v.shape[0] for v in self.inputs.values() if isinstance(v, Tensor))
        self._given: list[Any] = []
        self.reuses = reuse and _is_plain(view)
        with torch.no_grad(), self._keeping() if self.reuses else nullcontext():
            self.output = logits_of(view.model(**self.inputs))
        if self.reuses:
            self.reuses = self._tried()

    @property
    def layers(self) -> int:
        return len(self.view.layers)

    def start_of(self, writes: Mapping[Site, Write]) -> int:
        """Number, in order of execution, of the first layer that the writes can change."""
        places = {(layer.stack, layer.index): n for n, layer in enumerate(self.view.layers)}
        found = self.layers
        for site in writes:
            at = (site.stack or self.view.stacks[0], site.layer)
            # the residual past the last layer of a stack is what that layer leaves
            found = min(found, places.get(at, places.get((at[0], at[1] - 1), 0)))
        return min(found, self.layers - 1)

    def run(
        self,
        writes: Mapping[Site, Write],
        copies: int = 1,
        start: int | None = None,
    ) -> Tensor:
        """The model's answer `(copies * batch, ...)` with the writes in force.

        `copies`: how often the inputs stand behind each other, copy after copy, so that a write
        can change each copy in a way of its own. `start`: the first layer, in order of execution,
        that is computed anew, by default the first that a write names. Gradients pass from there.
        """
        begin = self.start_of(writes) if start is None else start
        inputs = {key: self.repeated(value, copies) for key, value in self.inputs.items()}
        with self._answering(begin if self.reuses else 0, copies), touching(self.view, writes):
            return logits_of(self.view.model(**inputs))

    def repeated(self, value: Any, copies: int) -> Any:
        """What belongs to the inputs, or several such things, for each of the copies; what serves
        the whole batch stays as it is."""
        if isinstance(value, tuple | list):
            return type(value)([self.repeated(part, copies) for part in value])
        if copies == 1 or not isinstance(value, Tensor) or not value.dim():
            return value
        if value.shape[0] != self.batch:  # a table that serves the whole batch
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))

    def _tried(self) -> bool:
        with torch.no_grad():
            again = self.run({}, start=self.layers - 1)
        if again.shape != self.output.shape:
            return False
        size = self.output.abs().amax().clamp_min(1e-12)
        return bool((again - self.output).abs().amax() <= TOLERANCE * size)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        handles = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._given.append(_detached(output))

        for layer in self.view.layers:
            handles.append(layer.module.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.reuses = self.reuses and len(self._given) == self.layers

    @contextmanager
    def _answering(self, start: int, copies: int) -> Iterator[None]:
        """The layers below `start` give what they gave; only the last of a stack is read."""
        silent = self.view.layers[:start]
        read = {layer.stack: n for n, layer in enumerate(silent)}
        touched: list[nn.Module] = []

        def answer(number: int) -> Callable[..., Any]:
            known, whole = self._given[number], number in read.values()
            return lambda *args, **kwargs: self.repeated(known, copies) if whole else known

        try:
            for number, layer in enumerate(silent):
                layer.module.forward = answer(number)
                touched.append(layer.module)
            yield
        finally:
            for module in touched:
                del module.forward


def logits_of(output: Any) -> Tensor:
    """What a model answers: its logits where it has some, else the first tensor of its output."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    first = output[0] if isinstance(output, tuple | list) else output
    if isinstance(first, Tensor):
        return first
    values = getattr(first, "values", None)
    tensors = [v for v in values() if isinstance(v, Tensor)] if values is not None else []
    if not tensors:
        raise TypeError(f"{type(output).__name__} holds no tensor; expected logits, or a tensor")
    return tensors[0]


def _is_plain(view: ModelView) -> bool:
    """Whether every layer is a module of its own that hands on the residual."""
    modules = {id(layer.module) for layer in view.layers}
    if len(modules) < len(view.layers):
        return False
    if any("forward" in vars(layer.module) for layer in view.layers):
        return False  # somebody else stands in for it
    if any(getattr(module, "recalls", False) for module in view.model.modules()):
        return False  # a layer needs what happens inside an earlier one
    stacks = [m for m in view.model.modules() if isinstance(m, Stack)]
    blocks = any(isinstance(layer.module, Block) for layer in view.layers)
    return not blocks or all(type(stack.wiring) is PreNorm for stack in stacks)


def _detached(output: Any) -> Any:
    if isinstance(output, tuple | list):
        return type(output)([_detached(part) for part in output])
    return output.detach() if isinstance(output, Tensor) else output
