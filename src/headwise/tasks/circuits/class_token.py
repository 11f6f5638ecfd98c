"""A vision transformer whose class token reads the one patch that is marked."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from headwise.models.backbones.patches import VisionPatches
from headwise.models.heads.classify import Classify
from headwise.parts.feed.mlp import Mlp
from headwise.tasks.circuits.known import Contrast, KnownCircuit, KnownEdge
from headwise.tasks.circuits.stream import (
    LOUD,
    SHARP,
    Stream,
    attention,
    blank_mlp,
    write_head,
)
from headwise.tasks.task import Batch, Task

GAIN = 10.0


class MarkedPatch(Task):
    """Which of 4 pixels is lit in the marked patch of 2 x 2?

    `pixel_values` `(batch, 3, 2 side, 2 side)` of zeros and ones: in channel 0 one pixel of every
    patch is lit; channel 1 is 1 on the marked patch; channel 2 is 1 on another one, bright and
    without meaning. The class is the number of the pixel, row by row.

    Solved by attention that goes by the mark, and by a layer that mutes what is not marked, with a
    mean. Not solved by the mean of patches alone, nor by going for the bright one. Chance is 1 / 4.
    """

    chance = 0.25

    def __init__(self, side: int = 3, seed: int = 0) -> None:
        if side < 2:
            raise ValueError(f"MarkedPatch needs side >= 2, not {side}")
        self.side, self.seed = side, seed

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(), cls(side=2))

    def make(self, size: int, generator: torch.Generator) -> Batch:
        """facts: `marked` and `bright` `(size,)`, which patches; `lit` `(size, patches)`."""
        patches = self.side**2
        lit = torch.randint(4, (size, patches), generator=generator)
        chosen = torch.rand(size, patches, generator=generator).argsort(1)[:, :2]
        return self.drawn(lit, chosen[:, 0], chosen[:, 1])

    def drawn(self, lit: torch.Tensor, marked: torch.Tensor, bright: torch.Tensor) -> Batch:
        """The problems with these pixels `(size, patches)`, this mark and this bright patch."""
        rows = torch.arange(len(lit))
        values = torch.zeros(len(lit), self.side**2, 3, 4)
        values[:, :, 0] = torch.eye(4)[lit]
        values[rows, marked, 1] = values[rows, bright, 2] = 1.0
        grid = values.view(len(lit), self.side, self.side, 3, 2, 2).permute(0, 3, 1, 4, 2, 5)
        pixels = grid.reshape(len(lit), 3, 2 * self.side, 2 * self.side)
        facts = {"marked": marked, "bright": bright, "lit": lit}
        return Batch({"pixel_values": pixels}, lit[rows, marked], facts)


def class_token(side: int = 3) -> KnownCircuit:
    """Two layers on `side` x `side` patches; L1H1 looks from the class token at the marked patch
    and brings its pixels, which the classes are read from.

    L1H0 looks at the bright patch, and nobody reads it. The control mutes the pixels of patches
    without a mark in the feed-forward layer of layer 0, and L1H2 takes the mean of all; L1H1 looks
    at the marked patch there, too.
    """
    task = MarkedPatch(side)
    decoys = {
        (0, 0): "looks at the marked patch before anything could be done with it",
        (0, 1): "the mean of all patches",
        (0, 2): "the mean of all patches",
        (1, 0): "looks at the bright patch, and nobody reads it",
    }
    return KnownCircuit(
        name="class token reads one patch",
        model=_model(task, by_mark=True),
        task=task,
        heads=frozenset({(1, 1)}),
        feeds=frozenset(),
        edges=frozenset(
            {
                KnownEdge("embed", "L1H1.q"),
                KnownEdge("embed", "L1H1.k"),
                KnownEdge("embed", "L1H1.v"),
                KnownEdge("L1H1", "logits"),
            }
        ),
        decoys={**decoys, (1, 2): "the mean of all patches, which nobody reads"},
        contrast=lambda size, seed: _contrast(task, size, seed),
        control=lambda: _control(task, decoys),
    )


def _control(task: MarkedPatch, decoys: dict[tuple[int, int], str]) -> KnownCircuit:
    return KnownCircuit(
        name="mean of muted patches",
        model=_model(task, by_mark=False),
        task=task,
        heads=frozenset({(1, 2)}),
        feeds=frozenset({0}),
        edges=frozenset(
            {
                KnownEdge("embed", "L0 mlp"),
                KnownEdge("L0 mlp", "L1H2.v"),
                KnownEdge("L1H2", "logits"),
            }
        ),
        decoys={**decoys, (1, 1): "looks at the marked patch, and nobody reads it"},
        contrast=lambda size, seed: _contrast(task, size, seed),
    )


def _model(task: MarkedPatch, by_mark: bool) -> VisionPatches:
    s = Stream(pixel=4, mark=1, bright=1, is_class=1, muted=4, out=4, unread=4)

    def feed(layer: int) -> Mlp | None:
        return None if by_mark or layer else _mute(s)

    model = VisionPatches(
        2 * task.side,
        2,
        dim=s.width,
        depth=2,
        mixer=lambda layer: attention(s, 3, causal=False),
        head=Classify(s.width, 4, pool="first"),
        class_token=True,
        positions=None,
        feed=feed,
        norm=lambda width: nn.Identity(),
    )
    one = torch.ones(1, 1)
    at_mark = s.matrix(("is_class", "mark", SHARP * one))
    at_bright = s.matrix(("is_class", "bright", SHARP * one))
    copy = s.matrix(("out", "pixel", 1.0))
    patches = float(task.side**2 + 1)  # the mean is over the class token too
    parts: Any = model
    with torch.no_grad():
        for parameter in (*model.patches.parameters(), parts.class_token, *parts.head.parameters()):
            parameter.zero_()
        parts.class_token[s["is_class"]] = 1.0
        model.patches.weight[s["pixel"], 0] = torch.eye(4).view(4, 2, 2)
        model.patches.weight[s["mark"], 1] = 0.25
        model.patches.weight[s["bright"], 2] = 0.25
        parts.head.linear.weight[:, s["out"]] = GAIN * torch.eye(4)
        lower, upper = model.stack.mixers
        write_head(lower, 0, at_mark, s.loud("pixel"))
        write_head(lower, 1, s.matrix(), s.loud("bright"))
        write_head(lower, 2, s.matrix(), s.loud("mark"))
        write_head(upper, 0, at_bright, s.loud("pixel", 2 * LOUD))
        write_head(upper, 1, at_mark, copy if by_mark else s.loud("pixel"))
        mean = s.loud("pixel") if by_mark else s.matrix(("out", "muted", patches))
        write_head(upper, 2, s.matrix(), mean)
    return model.eval()


def _mute(s: Stream) -> Mlp:
    """Pixels that are lit on a patch with the mark."""
    made = blank_mlp(s, 4)
    with torch.no_grad():
        made.up.weight[:, s["pixel"]] = torch.eye(4)
        made.up.weight[:, s["mark"]] = 1.0
        made.up.bias.fill_(-1.0)
        made.down.weight[s["muted"]] = torch.eye(4)
    return made


def _contrast(task: MarkedPatch, size: int, seed: int) -> Contrast:
    """In the marked patch another pixel is lit; the other patches stay."""
    clean = task.batch(seed, size, "test")
    lit, marked, bright = (clean.facts[name] for name in ("lit", "marked", "bright"))
    rows = torch.arange(size)
    other = lit.clone()
    move = torch.randint(1, 4, (size,), generator=task.generator(seed, "valid"))
    other[rows, marked] = (lit[rows, marked] + move) % 4
    corrupted = task.drawn(other, marked, bright)
    return Contrast(clean.inputs, corrupted.inputs, clean.targets, corrupted.targets)
