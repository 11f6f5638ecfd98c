"""Numbers of heads and channels that go, and gates of layers, as things that can be learned under a
FLOPs budget (Yu et al. 2022, arXiv 2203.08243). For stacks of our own whose layers are alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.structure.channels import prune_channels
from headwise.compress.structure.heads import prune_heads
from headwise.compress.structure.layers import drop_layers
from headwise.models import ModelView, view
from headwise.models.projections import features_first
from headwise.models.spots import down_projection

Given = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
RATE, SHARE_RATE, GATE_RATE, Y_RATE, Z_RATE, PULL, DAMPING = 2e-3, 0.02, 0.02, 6e-4, 0.4, 0.3, 15.0
BATCH = 64


@dataclass(frozen=True)
class Size:
    """Numbers of a vision transformer whose layers are alike."""

    layers: int
    tokens: int
    width: int
    heads: int
    head_dim: int
    channels: int

    @classmethod
    def of(cls, look: ModelView, tokens: int) -> Size:
        first, weight = look.attentions[0], features_first(down_projection(look.layers[0]))
        width, channels = weight.shape
        return cls(len(look.layers), tokens, width, first.heads, first.head_dim, channels)


def flops(size: Size, removed: Tensor, gates: Tensor) -> Tensor:
    """FLOPs of all layers; `removed` `(layers, 2)`: heads and channels that go; `gates`
    `(layers,)`: 1 where a layer runs. A head costs four projections and two products of its map."""
    n, wide = size.tokens, size.head_dim
    head, channel = 8 * n * size.width * wide + 4 * n * n * wide, 4 * n * size.width
    each = (size.heads - removed[:, 0]) * head + (size.channels - removed[:, 1]) * channel
    return (gates * each).sum()


def groups(look: ModelView, layer: int) -> tuple[Tensor, Tensor]:
    """Views of the weights that leave each head `(heads, width, head_dim)` and each channel
    `(channels, width)`."""
    down = features_first(down_projection(look.layers[layer]))
    return look.attentions[layer].output_weight().detach(), down.detach().T


def bottom(group: Tensor, count: int) -> list[int]:
    """The `count` groups with the smallest sums of squares."""
    squares = group.flatten(1).square().sum(1)
    return sorted(squares.argsort()[:count].tolist())


@contextmanager
def gated(look: ModelView, gates: Tensor) -> Iterator[None]:
    """Each layer gives gate * layer(x) + (1 - gate) * x."""

    def hook(layer: int) -> Callable[..., Tensor]:
        return lambda module, given, out: given[0] + gates[layer] * (out - given[0])

    handles = [m.module.register_forward_hook(hook(m.index)) for m in look.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut(
    model: nn.Module,
    removed: Tensor,
    gates: Tensor,
    choose: Callable[[Tensor, int], list[int]] = bottom,
) -> nn.Module:
    """A copy without the bottom groups of each layer and without layers whose gate is 0."""
    small = copy.deepcopy(model)
    look = view(small)
    heads, channels = [], {}
    for layer, (h, c) in enumerate(removed.int().tolist()):
        leaving, fed = groups(look, layer)
        heads += [(layer, one) for one in choose(leaving, h)]
        channels[layer] = choose(fed, c)
    if heads:
        prune_heads(small, heads)
    prune_channels(small, channels)
    gone = [layer for layer, gate in enumerate(gates.tolist()) if gate == 0]
    if gone:
        drop_layers(small, gone)
    return small


def through(real: Tensor, whole: Tensor) -> Tensor:
    """The value of `whole` with the slope of `real`."""
    return real + (whole - real).detach()


@dataclass(eq=False)
class Learning:
    """What is learned beside the weights: `shares` `(layers, 2)` of heads and channels that go,
    `logits` `(layers,)` of the gates, multipliers y `(layers, 2)` and z, and how it went."""

    size: Size
    shares: Tensor
    logits: Tensor
    y: Tensor
    z: float
    spent: list[float] = field(default_factory=list)
    prices: list[float] = field(default_factory=list)

    def climb(self, over: float, rate: float, damping: float) -> float:
        """Raise z by what is over the budget; the price of FLOPs, damped by what is over."""
        self.z = max(0.0, self.z + rate * over)
        return max(0.0, self.z + damping * over)

    @classmethod
    def start(cls, size: Size, z: float = 0.0) -> Learning:
        zero = torch.zeros(size.layers, 2)
        open_ = torch.full((size.layers,), 3.0)
        return cls(size, zero.clone(), open_, zero + 1e-3, z)

    def removed(self) -> Tensor:
        real = self.shares * self.most()
        return through(real, real.ceil())

    def most(self) -> Tensor:
        return torch.tensor([self.size.heads - 1.0, self.size.channels - 1.0])

    def open(self) -> Tensor:
        """Gates without noise, 0 or 1; the likeliest is open if all were to close."""
        likely = self.logits.sigmoid()
        hard = (likely > 0.5).float()
        hard[self.logits.argmax()] = 1.0
        return through(likely, hard)

    def share(self) -> Tensor:
        """Of the FLOPs of the whole model's layers."""
        whole = flops(self.size, torch.zeros(self.size.layers, 2), torch.ones(self.size.layers))
        return flops(self.size, self.removed(), self.open()) / whole


@torch.no_grad()
def shrink(look: ModelView, state: Learning) -> tuple[Tensor, Tensor]:
    """The proximal step on the bottom groups; their sums of squares `(layers, 2)`, and what the
    next group has, which is the slope of the sum in s."""
    left, edge = torch.zeros_like(state.y), torch.zeros_like(state.y)
    for layer, counts in enumerate(state.removed().int().tolist()):
        for kind, group in enumerate(groups(look, layer)):
            count = counts[kind]
            group[bottom(group, count)] /= 1 + 2 * state.y[layer, kind]
            squares = group.flatten(1).square().sum(1).sort().values
            left[layer, kind], edge[layer, kind] = squares[:count].sum(), squares[count]
    return left, edge


def primal_dual(
    student: Any, loss_of: Loss, given: Given, budget: float, steps: int, seed: int,
    kind: type[Learning] = Learning,
) -> Learning:  # fmt: skip
    """Train `student` in place, on given = (images, labels), and find numbers, gates and
    multipliers; the rates fall in the end, so that the numbers settle."""
    look = view(student)
    state, (images, labels) = kind.start(Size.of(look, student.tokens)), given[:2]
    weights = torch.optim.AdamW(student.parameters(), RATE, weight_decay=0.01)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        left_of = 1 - step / steps  # rates fall, those of the numbers in the last quarter
        slow = min(1.0, 4 * left_of)
        weights.param_groups[0]["lr"] = RATE * left_of
        shares, logits = state.shares.requires_grad_(), state.logits.requires_grad_()
        drawn = torch.randint(0, len(images), (BATCH,), generator=random)
        with torch.enable_grad():
            u = torch.rand(state.size.layers, generator=random).clamp(1e-6, 1 - 1e-6)
            soft = ((logits + u.logit()) / 0.5).sigmoid()  # Gumbel-softmax of two classes
            with gated(look, through(soft, (soft > 0.5).float())):
                loss = loss_of(student, images[drawn], labels[drawn])
            weights.zero_grad()
            loss.backward()
            share = state.share()
            dear = torch.autograd.grad(share, (shares, logits))
        weights.step()
        state.spent.append(float(share.detach()))
        price = state.climb(state.spent[-1] - budget, Z_RATE, DAMPING)
        state.prices.append(state.z)
        assert logits.grad is not None
        gate_slope = logits.grad + price * dear[1]
        state.logits = logits.detach() - slow * GATE_RATE * gate_slope
        state.shares = shares.detach()
        left, edge = shrink(look, state)
        slope = price * dear[0] + state.y * edge * state.most() + PULL * state.shares
        state.shares = (state.shares - slow * SHARE_RATE * slope).clamp(0, 1)
        state.y = state.y + Y_RATE * left
    return state
