"""Norms with their statistics held fixed, and the answer as a linear function of the residual."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.gains import find_gain
from headwise.instruments.metrics import Metric
from headwise.instruments.readout import Readout
from headwise.models import UnsupportedModelError

__all__ = ["Frozen", "LinearAnswer", "frozen", "linear_answer"]

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Frozen:
    """x -> gain * (x - mean(x)) / size + bias, with the size that each position had. gain, bias:
    `(width,)`; size: `(..., 1)`; float64."""

    gain: Tensor
    centred: bool
    size: Tensor
    bias: Tensor

    def back(self, counts: Tensor) -> Tensor:
        """What counts before the norm, `(..., width)`, where `counts` is what counts behind it."""
        folded = counts.double() * self.gain
        if self.centred:
            folded = folded - folded.mean(-1, keepdim=True)
        return folded / self.size


def frozen(norm: nn.Module | None, given: Tensor, made: Tensor, where: str) -> Frozen:
    """The norm (None: nothing) as it was when it made `made` of `given`, both `(..., width)`.

    Raises UnsupportedModelError, saying `where`, if it is no norm or scale, or did something else.
    """
    width, device = given.shape[-1], given.device
    found = find_gain(norm, width)
    if isinstance(found, str):
        raise UnsupportedModelError(f"{where}: {found}")
    gain = found.gain.to(device)
    x, y = given.detach().double(), made.detach().double()
    bias = torch.zeros(width, dtype=torch.float64, device=device)
    if norm is not None:
        with torch.no_grad():
            bias = norm(torch.zeros_like(given[:1, :1]))[0, 0].double()
    middle = x - x.mean(-1, keepdim=True) if found.centred else x
    unscaled = gain * middle
    inside = unscaled.pow(2).sum(-1, keepdim=True)
    # one over the size is the slope from the unscaled to what came out
    slope = ((y - bias) * unscaled).sum(-1, keepdim=True) / inside.clamp_min(1e-300)
    size = torch.where(slope == 0, torch.ones_like(slope), 1 / slope)
    off = (unscaled / size + bias - y).abs().amax()
    if float(off) > _TOLERANCE * float(y.abs().amax().clamp_min(1e-12)):
        raise UnsupportedModelError(
            f"{where}: what comes out is not what goes in, normed (off by {float(off):.2g}): "
            "something that is not known stands there"
        )
    return Frozen(gain, found.centred, size, bias)


@dataclass(frozen=True, eq=False)
class LinearAnswer:
    """score = <residual, direction> + constant, summed over positions and width.

    direction `(batch, n, width)`, score, constant `(batch,)`: float64. capped: the soft cap that
    the logits were taken before, None where there is none.
    """

    direction: Tensor
    constant: Tensor
    score: Tensor
    capped: float | None


def linear_answer(read: Readout, metric: Metric) -> LinearAnswer:
    """The metric of a model's answer as a function of its last residual, the final norm frozen.

    Raises UnsupportedModelError where the head is not linear behind the norm, ValueError for a
    metric that is not linear in the logits.
    """
    view, last = read.view, read.last
    with _uncapped(view.model) as capped:
        made: list[Tensor] = []
        if view.final_norm is not None:

            def keep(module: nn.Module, args: Any, output: Tensor) -> None:
                made.append(output)

            handle = view.final_norm.register_forward_hook(keep)
            try:
                with torch.no_grad():
                    read(last)
            finally:
                handle.remove()
        normed = made[-1] if made else last
        if normed.shape != last.shape:
            raise UnsupportedModelError(
                f"{type(view.model).__name__} pools positions before its final norm, whose size "
                "then belongs to no position"
            )
        norm = view.final_norm if made else None
        here = frozen(norm, last, normed, "the final norm")

        def score(x: Tensor) -> Tensor:
            with _giving(norm, x):
                logits = read(last if norm is not None else x)
            return metric.score(logits.float(), read.inputs)

        leaf = normed.detach().clone().requires_grad_()
        value = score(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        with torch.no_grad():
            least, half = score(torch.zeros_like(leaf)).double(), score(leaf / 2).double()
    value, slope = value.detach().double(), slope.double()
    linear = (slope * normed.double()).sum((1, 2))
    most = float(torch.stack([value.abs(), linear.abs(), least.abs()]).amax().clamp_min(1e-6))
    off = max(float((value - least - linear).abs().amax()), _middle_off(value, least, half))
    if off > _TOLERANCE * most:
        _refuse(read, metric)
    constant = least + (slope * here.bias).sum((1, 2))
    return LinearAnswer(here.back(slope), constant, value, capped)


def _middle_off(value: Tensor, least: Tensor, half: Tensor) -> float:
    return float((half - (value + least) / 2).abs().amax())


def _refuse(read: Readout, metric: Metric) -> None:
    """Whose fault it is: the metric's, on logits that are linear by themselves, or the head's."""
    shape = read.output.shape
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=random).to(read.output.device) for _ in range(2))
    scores = [metric.score(x, read.inputs).double() for x in (a, b, a + b, torch.zeros_like(a))]
    off = (scores[2] + scores[3] - scores[0] - scores[1]).abs().amax()
    if float(off) > _TOLERANCE * float(torch.stack(scores).abs().amax().clamp_min(1e-6)):
        raise ValueError(
            f"{metric.name} is not linear in the logits, so it does not fall into a sum: take a "
            "logit, or LogitDifference(right, wrong)"
        )
    raise UnsupportedModelError(
        f"the head of {type(read.view.model).__name__} is not linear behind its final norm, so its "
        "answer does not fall into a sum over what was added to the residual"
    )


@contextmanager
def _giving(norm: nn.Module | None, x: Tensor) -> Iterator[None]:
    """While this lasts, the norm gives x."""
    if norm is None:
        yield
        return
    handle = norm.register_forward_hook(lambda module, args, output: x)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _uncapped(model: nn.Module) -> Iterator[float | None]:
    """The model without a soft cap on its logits; gives the cap."""
    config = getattr(model, "config", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if config is None or cap is None:
        yield None
        return
    config.final_logit_softcapping = None
    try:
        yield float(cap)
    finally:
        config.final_logit_softcapping = cap
