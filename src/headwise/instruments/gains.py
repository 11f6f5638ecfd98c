"""The linear part of a normalisation, found by probing it instead of by its name.

A layer norm or RMS norm is x -> g * (x - mean(x)) / size(x) + b, or without the mean. Its gain g
and the centring are linear and fold into the weights on either side; the division by the size is
one positive number a token and does not. Probing finds g also where the module keeps it in a form
of its own (Gemma stores g - 1), and notices a module that does something else.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Gain", "find_gain"]

_SCALE = 100.0  # large against the square root of any epsilon in use
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Gain:
    """x -> gain * (x - mean(x)) + bias, the mean only if `centred`. gain, bias: (size,) float64 on
    the CPU. A bias is added behind the division by a norm's size, so that it needs no other."""

    gain: Tensor
    centred: bool
    bias: Tensor | None = None

    def into_input(self, weight: Tensor) -> Tensor:
        """W of shape (..., size) with this in front: W diag(g) C."""
        folded = weight * self.gain.to(weight)
        return folded - folded.mean(-1, keepdim=True) if self.centred else folded

    def after_output(self, weight: Tensor) -> Tensor:
        """W of shape (..., size, d) with this behind: diag(g) C W."""
        if self.centred:
            weight = weight - weight.mean(-2, keepdim=True)
        return self.gain.to(weight)[:, None] * weight


def find_gain(norm: nn.Module | None, size: int) -> Gain | str:
    """The linear part of `norm` on vectors of `size`, or the reason why it has none.

    None, no norm at all, has a gain of one. A plain scaling, such as a layer scale, has one too.
    """
    if norm is None:
        return Gain(torch.ones(size, dtype=torch.float64), centred=False)
    name = type(norm).__name__
    probe = _signs(size)
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(size, generator=generator, dtype=torch.float64) + 0.5
    points = torch.stack([probe, -probe, 2 * probe, -2 * probe, probe + 1, other, -other])
    try:
        values = _call(norm, _SCALE * points)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        return f"{name} does not map vectors of {size} numbers by themselves ({error})"
    if values.shape != points.shape:
        return f"{name} maps {size} numbers to {tuple(values.shape[1:])}"
    odd, twice = (values[0] - values[1]) / 2, (values[2] - values[3]) / 2
    gain = odd / probe
    centred = False
    if _close(twice, odd):  # the size of the input is divided out: a norm
        centred = _close(values[4], values[0])
        middle = other - other.mean() if centred else other
        expected = gain * middle / middle.pow(2).mean().sqrt()
    else:
        gain = gain / _SCALE
        expected = gain * other * _SCALE
    # what does not change its sign with the input can only be a bias, the same everywhere
    biases = torch.stack([values[0] + values[1], values[2] + values[3], values[5] + values[6]]) / 2
    biased = (biases - biases[0]).norm() <= _TOLERANCE * odd.norm() + 1e-6 * biases.norm()
    if not biased or not _close((values[5] - values[6]) / 2, expected):
        return f"{name} is no norm or scaling whose gain could be folded into the weights"
    bias = biases.mean(0)
    return Gain(gain, centred, bias if bias.norm() > 1e-9 * odd.norm() else None)


def _signs(size: int) -> Tensor:
    """(size,) without a zero, with mean 0 and mean square 1 (the best there is for size 1)."""
    signs = torch.ones(size, dtype=torch.float64)
    signs[1::2] = -1
    if size % 2 and size > 1:
        signs[:3] = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)
        signs[3::2], signs[4::2] = 1, -1
    return signs / math.sqrt(float(signs.pow(2).mean()))


def _call(norm: nn.Module, points: Tensor) -> Tensor:
    """Values of the module with its numbers in float64, so that bfloat16 adds no rounding."""
    state = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    device = next((value.device for value in state.values()), torch.device("cpu"))
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in state.items()}
    with torch.no_grad():
        found = torch.func.functional_call(norm, exact, (points.to(device)[None],))
    return found[0].double().cpu()


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _TOLERANCE * max(float(b.norm()), 1e-30))
