"""Second moments of what modules are handed, gathered while calibration text runs through.

Everything that a linear map can be fitted to is in them: for inputs x and targets y the sums of
x x^T and y x^T, in float64, one tile of tokens at a time. Nothing else of the text is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.examples import Examples
from headwise.instruments.run import evaluating


class Moments:
    """Sums over tokens, float64: `count`; `total` `(in,)` of x; `square` `(in, in)` of x x^T; and
    where targets are given `target` `(out,)` of y, `cross` `(out, in)` of y x^T, and `energy` of
    |y|^2."""

    def __init__(self) -> None:
        self.count = 0
        self.energy = 0.0
        self.total = self.square = self.target = self.cross = torch.zeros(())

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """x `(tokens, in)`, y `(tokens, out)`."""
        wide = x.detach().double()
        self.count += len(wide)
        self.total = self.total + wide.sum(0)
        self.square = self.square + wide.T @ wide
        if y is not None:
            goal = y.detach().double()
            self.target = self.target + goal.sum(0)
            self.cross = self.cross + goal.T @ wide
            self.energy += float(goal.square().sum())

    @property
    def mean(self) -> Tensor:
        return self.total / max(1, self.count)

    def second(self, centred: bool = False) -> Tensor:
        """E x x^T `(in, in)`, of x minus its mean where `centred`."""
        found = self.square / max(1, self.count)
        return found - torch.outer(self.mean, self.mean) if centred else found


def input_moments(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Examples]
) -> dict[str, Moments]:
    """Name -> moments of what each module is handed, in one pass over the examples.

    Padding (tokens where `attention_mask` is 0) does not count. Raises ValueError for a module
    that was handed nothing.
    """
    found = {name: Moments() for name in modules}
    body = body_of(model, modules.values())
    with evaluating(model), torch.no_grad():
        for batch in batches:
            hooks = [
                module.register_forward_pre_hook(_adding(found[name], batch))
                for name, module in modules.items()
            ]
            try:
                run(body, batch)
            finally:
                for hook in hooks:
                    hook.remove()
    silent = [name for name, moments in found.items() if not moments.count]
    if silent:
        raise ValueError(f"no token of the inputs reached {', '.join(silent[:3])}")
    return found


def _adding(moments: Moments, batch: Examples) -> Any:
    def add(module: nn.Module, args: Any) -> None:
        moments.add(tokens_of(args[0], batch))

    return add


def tokens_of(x: Tensor, batch: Examples) -> Tensor:
    """`(tokens, width)` of the real tokens out of `(batch, n, width)` or `(batch * n, width)`."""
    mask = batch.inputs.get("attention_mask")
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or mask.dim() != 2 or mask.numel() != len(flat) or bool(mask.all()):
        return flat
    return flat[mask.reshape(-1).bool()]


def body_of(model: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """The model without its output layer where all of `modules` lie inside: logits of long texts
    take more memory than anything else."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return model
    inside = {id(module) for module in base.modules()}
    return base if all(id(module) in inside for module in modules) else model


def run(body: nn.Module, batch: Examples) -> Any:
    """The model on a batch, without a cache; None where `stopping` ended it early."""
    more = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    try:
        return body(**batch.given, **more)
    except _SeenError:
        return None


class _SeenError(Exception):
    """What was wanted of a pass has been seen."""


@contextmanager
def stopping(module: nn.Module) -> Iterator[None]:
    """Passes through `run` end once this module has run."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _SeenError

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()
