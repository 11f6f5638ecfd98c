"""Blocks that work in any order.

A trained network falls apart when its layers run in another order, or when one is missing: each
relies on what stands before it. LayerShuffle draws a new order of the blocks for every training
batch, so each block learns to improve whatever it is handed. Then any order works at test time, a
few points below the network that was trained in order; blocks can be left out; and blocks of
several models trained so can be mixed into one. Two variants tell a block where it runs (an
embedding of its place, added to what it reads) or ask it (a small head guesses the place).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.models.backbones import VisionPatches
from headwise.models.heads import Classify
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Mlp
from headwise.tasks import Digits
from headwise.train import evaluate, fit, seeded

VARIANTS = ("plain", "position", "predict")


@paper(
    title="LayerShuffle: Enhancing Robustness in Vision Transformers by Randomizing Layer "
    "Execution Order",
    source="arXiv 2407.04513",
    year=2024,
    modality="image",
    plain="Every training batch runs the blocks in a new random order, so that any order works.",
    equation=r"x_{k+1} = y_k + F_{\pi(k)}(y_k),\quad y_k = x_k + e_k,\qquad \pi \sim S_L",
    parts=("VisionPatches", "Attention"),
    reported="Any order at test time with about 20 % lower accuracy at equal size; merged "
    "models work without loss; pruned ones decline gracefully.",
    unsure="Where the embedding of the place enters (here it is added to the residual before the "
    "block) and the weight of the guess (here 0.1).",
    needs=("sklearn",),
    taxonomy=("architecture/alternative", "beyond/training"),
    use="""
from headwise.papers.depth.layer_shuffle import LayerShuffle

model = LayerShuffle(depth=6)  # trained with any loop; evaluate with model.order = [3, 1, 5]
""",
)
class LayerShuffle(nn.Module):
    """Images 8 x 8 to 10 classes `(batch, 10)`, by `depth` blocks in a random order while it
    trains, and afterwards in `order`: numbers of blocks, all in turn by default; some may be left
    out. `shuffle=False` trains in order."""

    def __init__(
        self, depth: int = 6, dim: int = 32, variant: str = "plain", shuffle: bool = True
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is none of {', '.join(VARIANTS)}")
        self.depth, self.variant, self.shuffle = depth, variant, shuffle
        self.model = VisionPatches(
            8,
            4,
            dim,
            depth,
            lambda layer: Attention(dim, 4),
            Classify(dim, classes=10),
            channels=1,
            feed=lambda layer: Mlp(dim, 2 * dim),
        )
        self.order: Sequence[int] | None = None
        self.place = nn.Embedding(depth, dim) if variant == "position" else None
        self.guess: nn.Module | None = None
        if variant == "predict":
            self.guess = nn.ModuleList(nn.Linear(dim, depth) for _ in range(depth))
        self.added: Tensor | float = 0.0

    def forward(self, pixel_values: Tensor) -> Any:
        order = list(range(self.depth)) if self.order is None else list(self.order)
        if self.training and self.shuffle:
            order = torch.randperm(self.depth).tolist()
        stack: Any = self.model.stack
        x, _ = self.model.embed(pixel_values)
        guesses = []
        for place, block in enumerate(order):
            if self.place is not None:
                x = x + self.place.weight[place]
            sublayers = {"mix": stack.mixers[block], "feed": stack.feeds[block]}
            x = stack.layers[block](x, stack.wiring, block, sublayers)
            if self.guess is not None:
                guesses.append(self.guess[block](x.mean(1)))  # type: ignore[index]
        if guesses:
            wanted = torch.arange(len(order)).repeat_interleave(len(pixel_values))
            self.added = 0.1 * F.cross_entropy(torch.cat(guesses), wanted)
        return self.model.answer(stack.wiring.end(x))

    def penalty(self) -> Tensor | float:
        """The loss of the blocks' guesses where they run."""
        return self.added


def in_order(depth: int = 6, variant: str = "plain") -> LayerShuffle:
    """The control: the same network, always in order."""
    return LayerShuffle(depth, variant=variant, shuffle=False)


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1)


@cache
def trained(make: Any, seed: int) -> LayerShuffle:
    """500 steps on handwritten digits."""
    with seeded(seed):
        model: LayerShuffle = make()
    fit(model, Digits(), steps=500, size=32, rate=6e-3, decay=0.0, seed=seed)
    return model.eval()


def accuracy(model: LayerShuffle, order: Sequence[int] | None = None) -> float:
    model.order = order
    found = evaluate(model, Digits(), 2, 150)["accuracy"]
    model.order = None
    return found


def orders(blocks: int, count: int = 10) -> list[list[int]]:
    """Random orders of so many of the six blocks."""
    draw = torch.Generator().manual_seed(11)
    return [torch.randperm(6, generator=draw)[:blocks].tolist() for _ in range(count)]


def mean_accuracy(model: LayerShuffle, blocks: int) -> float:
    found = [accuracy(model, order) for order in orders(blocks)]
    return sum(found) / len(found)


@claim(control=in_order, unit="accuracy lost", seeds=SEEDS, quick=False)
def any_order_works(make: Any, seed: int) -> Measured:
    """In ten random orders the mean accuracy is at most 0.15 below that of the network that was
    trained and is run in order; that network itself (control) loses more than twice as much."""
    best, mine = accuracy(trained(in_order, seed)), trained(make, seed)
    shuffled = mean_accuracy(mine, 6)
    return at_most(best - shuffled, 0.15, in_order=accuracy(mine), shuffled=shuffled, best=best)


@claim(control=in_order, unit="accuracy lost", seeds=SEEDS, quick=False)
def blocks_can_be_left_out(make: Any, seed: int) -> Measured:
    """Without two of six blocks, and with the others in any order, the accuracy falls by at most
    0.1; the network that was trained in order (control) falls apart."""
    model = trained(make, seed)
    full, four = accuracy(model), mean_accuracy(model, 4)
    return at_most(full - four, 0.1, full=full, four=four)


class NoPlace(LayerShuffle):
    """The control: a network with the variant's name that has no embedding of the place."""

    def __init__(self, variant: str = "plain", shuffle: bool = True) -> None:
        super().__init__(shuffle=shuffle)


@claim(subject=LayerShuffle, control=NoPlace, unit="largest difference of logits")
def a_block_is_told_where_it_runs(make: Any, seed: int) -> Measured:
    """With the blocks all alike their order could not matter; the position variant's does, for it
    tells each where it runs (at least 1e-3). Without that (control) it does not."""
    with seeded(seed):
        model = make(variant="position", shuffle=False).eval()
    stack = model.model.stack
    for modules in (stack.mixers, stack.feeds, *stack.wiring.norms.values()):
        for block in range(1, 6):
            modules[block].load_state_dict(modules[0].state_dict())
    x = Digits().batch(0, 8, "test").inputs["pixel_values"]
    plain = LayerShuffle(shuffle=False).eval()
    plain.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        return at_least((model(x) - plain(x)).abs().max(), 1e-3)


@picture
def what_orders_cost() -> Picture:
    """Accuracy with fewer blocks in random orders."""
    counts = [3, 4, 5, 6]
    return Picture(
        title="Handwritten digits read with the blocks that are left, in random orders",
        x="blocks left of 6",
        y="share of digits read rightly",
        lines={
            name: (counts, [mean_accuracy(trained(make, 0), n) for n in counts])
            for name, make in (
                ("trained so (LayerShuffle)", LayerShuffle),
                ("trained in order (control)", in_order),
            )
        },
    )
