"""Rounding is learned layer by layer, and bits are given out by an integer program.

Rounding weights to the nearest step keeps weights close to what they were; what counts is that a
layer's output stays close. The paper takes each layer by itself and moves its weights (by an
addition that is learned) and both step sizes so that the quantised layer gives the full one's
output on a few calibration inputs. So small a problem hardly overfits. Which layer gets how many
bits is an integer program: the most gain whose losses, measured one layer at a time and added up,
stay in a budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from headwise.compress import allocate
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture, within
from headwise.train import seeded

SEEDS = (0, 1, 2)


class _Round(torch.autograd.Function):
    """To whole numbers; gradients pass straight through."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def to_steps(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """x in whole steps, of which there are 2 ** bits around zero; 32 bits leave it."""
    if bits == 32:
        return x
    top = 2 ** (bits - 1)
    rounded: Tensor = _Round.apply((x / step).clamp(-top, top - 1))
    return rounded * step


def best_step(x: Tensor, bits: int) -> Tensor:
    """The step of least squared error, of 60 tried, one for each row of x."""
    largest = x.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    tried = [largest * share for share in np.linspace(0.2, 1.2, 60)]
    errors = torch.stack([(to_steps(x, s, bits) - x).square().sum(-1) for s in tried])
    return torch.stack(tried)[errors.argmin(0), torch.arange(len(x))]


@paper(
    title="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer "
    "Programming",
    source="arXiv 2006.10518",
    year=2020,
    plain="Each layer's weights and steps are learned so that its quantised output stays what it "
    "was; an integer program gives out the bits.",
    equation=r"\min_{V, \Delta_w, \Delta_x} \| W X - Q_{\Delta_w}(W + V)\, Q_{\Delta_x}(X) \|^2",
    parts=(),
    reported="ResNet-50 with 4-bit weights and activations, all but the two smallest layers, loses "
    "less than 1 % of accuracy.",
    unsure="The re-estimation of batch statistics and biases afterwards is left out.",
    needs=("scipy",),
    taxonomy=("beyond/compression",),
    use="""
import torch
from headwise.papers.compress.adaquant import adaquant

weight, inputs = torch.randn(32, 64), torch.randn(256, 64)
layer = adaquant(weight, inputs, bits=4)
print(layer(inputs).shape)
""",
)
def adaquant(
    weight: Tensor, inputs: Tensor, bits: int = 4, steps: int = 300, input_bits: int = 8
) -> Callable[[Tensor], Tensor]:
    """The layer `(..., in) -> (..., out)` with quantised weights `(out, in)` and inputs."""
    dw, dx = best_step(weight, bits), best_step(inputs.reshape(1, -1), input_bits)
    more = torch.zeros_like(weight).requires_grad_()
    logs = [dw.log().requires_grad_(), dx.log().requires_grad_()]
    rate = 0.1 * float(dw.mean())
    optimiser = torch.optim.Adam([{"params": [more], "lr": rate}, {"params": logs, "lr": 1e-3}])
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 1 - n / max(1, steps))
    want = inputs @ weight.T

    def layer(x: Tensor) -> Tensor:
        whole = to_steps(weight + more, logs[0].exp(), bits)
        inside = x if bits == 32 else to_steps(x, logs[1].exp(), input_bits)
        return inside @ whole.T

    with torch.enable_grad():
        for _ in range(steps if bits < 32 else 0):
            loss = (layer(inputs) - want).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
    return lambda x: layer(x).detach()


def nearest(weight: Tensor, inputs: Tensor, bits: int = 4) -> Callable[[Tensor], Tensor]:
    """The control: the best steps for weights and inputs, and rounding to the nearest."""
    return adaquant(weight, inputs, bits, 0)


Layer = Callable[..., Callable[[Tensor], Tensor]]


def problem(seed: int, count: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of 32 x 64, correlated inputs to calibrate on, and others to judge by."""
    with seeded(seed):
        weight, mix = (
            torch.randn(32, 64) / 8,
            torch.randn(64, 64) @ torch.diag(torch.logspace(0, -1.5, 64)) @ torch.randn(64, 64) / 8,
        )
        return weight, torch.randn(count, 64) @ mix, torch.randn(1024, 64) @ mix


def held_out(make: Layer, seed: int, count: int = 256) -> float:
    weight, inputs, others = problem(seed, count)
    want = others @ weight.T
    return float((make(weight, inputs, 4)(others) - want).square().mean() / want.square().mean())


@claim(control=nearest, unit="error of rounding to the nearest", seeds=SEEDS)
def outputs_stay_closer(make: Layer, seed: int) -> Measured:
    """With 4 bits for weights, 8 for inputs and 256 calibration rows, the error of the outputs on
    other rows is at most 0.7 of that of rounding to the nearest with the best steps."""
    return at_most(held_out(make, seed) / held_out(nearest, seed), 0.7)


def program(gains: np.ndarray, losses: np.ndarray, budget: float) -> tuple[int, ...]:
    """The most gain whose added losses are in the budget."""
    return allocate(losses, -gains, budget)


def greedy(gains: np.ndarray, losses: np.ndarray, budget: float) -> tuple[int, ...]:
    """The control: one layer after the other takes the most gain that is left to it."""
    taken, left = [], budget - losses.min(1).sum()
    for gain, loss in zip(gains, losses, strict=True):
        extra = loss - loss.min()
        best = max((c for c in range(len(gain)) if extra[c] <= left), key=lambda c: gain[c])
        left -= extra[best]
        taken.append(best)
    return tuple(taken)


@claim(control=greedy, subject=program, unit="share of the best gain", seeds=SEEDS)
def the_program_finds_the_best_bits(give: Callable[..., tuple[int, ...]], seed: int) -> Measured:
    """Six layers of unequal size with 8, 4 or 2 bits: the gain is that of the best of all 729
    tables in the budget, exactly."""
    random = np.random.default_rng(seed)
    sizes, need = random.integers(1, 20, 6), random.exponential(size=6)
    bits = np.array([8, 4, 2])
    gains, losses = sizes[:, None] * (8 - bits), need[:, None] * 4.0 ** -(bits - 2)
    budget = 0.4 * losses.max(1).sum()
    layers = range(6)
    best = max(
        sum(gains[n, c] for n, c in enumerate(taken))
        for taken in itertools.product(range(3), repeat=6)
        if sum(losses[n, c] for n, c in enumerate(taken)) <= budget
    )
    taken = give(gains.astype(float), losses, budget)
    inside = sum(losses[n, taken[n]] for n in layers) <= budget + 1e-9
    return at_least(sum(gains[n, taken[n]] for n in layers) / best if inside else 0.0, 1.0)


@cache
def network(seed: int) -> tuple[list[Tensor], Tensor]:
    with seeded(seed):
        return [torch.randn(32, 32) * 1.4 / 32**0.5 for _ in range(5)], torch.randn(256, 32)


def output_error(seed: int, bits: tuple[int, ...]) -> float:
    """Squared error of the last outputs with so many bits for each layer's weights."""
    weights, x = network(seed)
    want = exact = x
    for weight, b in zip(weights, bits, strict=True):
        exact = torch.tanh(exact @ weight.T)
        want = torch.tanh(want @ to_steps(weight, best_step(weight, b), b).T)
    return float((want - exact).square().mean())


def added(seed: int, bits: tuple[int, ...]) -> float:
    """Losses of each layer alone, added up."""
    exact = (32,) * 5
    return sum(
        output_error(seed, (*exact[:n], b, *exact[n + 1 :])) for n, b in enumerate(bits) if b < 32
    )


def mean_bits(seed: int, bits: tuple[int, ...]) -> float:
    """The control: how few bits there are."""
    return -float(np.mean(bits))


@claim(control=mean_bits, subject=added, unit="correlation", seeds=SEEDS)
def losses_add_up(predict: Callable[[int, tuple[int, ...]], float], seed: int) -> Measured:
    """In a network of five layers the losses of its layers alone, added up, correlate to 0.9 or
    more with the loss of 60 mixed tables (0.8 was asked; counting bits comes near that)."""
    random = np.random.default_rng(seed)
    tables = [tuple(int(b) for b in random.choice([3, 4, 6, 8], 5)) for _ in range(60)]
    pairs = np.array([[predict(seed, t), output_error(seed, t)] for t in tables])
    return at_least(float(np.corrcoef(pairs.T)[0, 1]), 0.9)


@claim(control=nearest, unit="largest difference")
def enough_bits_change_nothing(make: Layer, seed: int) -> Measured:
    """32 bits leave a layer as it was; the control has the 4 that the others are about."""
    weight, inputs, others = problem(seed)
    bits = 32 if make is adaquant else 4
    return within(float((make(weight, inputs, bits)(others) - others @ weight.T).abs().max()), 0, 0)


@picture
def error_by_rows() -> Picture:
    """Error on other rows by the number of calibration rows."""
    counts = [16, 32, 64, 128, 256, 512]
    kinds: dict[str, Layer] = {"learned (AdaQuant)": adaquant, "nearest (control)": nearest}
    lines = {name: (counts, [held_out(kind, 0, n) for n in counts]) for name, kind in kinds.items()}
    return Picture(
        title="4-bit weights: error on rows that were not calibrated on",
        x="calibration rows",
        y="relative squared error of outputs",
        lines=lines,
        log="x",
    )
