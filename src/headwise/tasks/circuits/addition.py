"""Addition in one layer: attention finds the digits of a place, and what is carried into it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.models.backbones.decoder import Decoder
from headwise.parts.feed.mlp import Mlp
from headwise.tasks.addition import Addition
from headwise.tasks.circuits.known import Contrast, KnownCircuit, KnownEdge
from headwise.tasks.circuits.stream import LOUD, Stream, blank_mlp, decoder

GAIN = 10.0
NOWHERE = -30.0
"""Score of what gets no weight."""


def addition(digits: int = 3) -> KnownCircuit:
    """Numbers of `digits` digits, highest first, answered digit by digit without a scratchpad, as
    the task of Quirke and Barez 2023 (arXiv 2310.13121), with another carry than theirs.

    Where the digit of place k is asked, L0H0 looks at a's digit of that place and L0H1 at b's.
    L0H2 looks at all lower digits of both with weights of 10^(j - k): what it brings is 1 or more
    if they carry, however far the carry comes (a cascade through nines included). All three add
    to one number w; the feed-forward layer is a staircase, floor(w) modulo 10.

    The control does it with one head: L0H3 looks at the digits of the place and of all lower
    places, in the same proportions; the other heads look where they look in the circuit.
    """
    task = Addition(digits=digits)
    return KnownCircuit(
        name="addition by places",
        model=_model(task, by_place=True),
        task=task,
        heads=frozenset({(0, 0), (0, 1), (0, 2)}),
        feeds=frozenset({0}),
        edges=_edges(0, 1, 2),
        decoys={
            (0, 3): "looks at the digits of the place and of all lower ones, and nobody reads it",
            (0, 4): "a sink",
            (0, 5): "looks at a's digit one place higher, and nobody reads it",
        },
        contrast=lambda size, seed: _contrast(task, size, seed),
        control=lambda: _control(task),
    )


def _control(task: Addition) -> KnownCircuit:
    return KnownCircuit(
        name="addition of whole numbers",
        model=_model(task, by_place=False),
        task=task,
        heads=frozenset({(0, 3)}),
        feeds=frozenset({0}),
        edges=_edges(3),
        decoys={
            (0, 0): "looks at a's digit of the place, and nobody reads it",
            (0, 1): "looks at b's digit of the place, and nobody reads it",
            (0, 2): "looks at the lower digits, and nobody reads it",
            (0, 4): "a sink",
            (0, 5): "looks at a's digit one place higher, and nobody reads it",
        },
        contrast=lambda size, seed: _contrast(task, size, seed),
    )


def _edges(*heads: int) -> frozenset[KnownEdge]:
    own = {KnownEdge("embed", f"L0H{h}.v") for h in heads} | {
        KnownEdge(f"L0H{h}", "L0 mlp") for h in heads
    }
    return frozenset({*own, KnownEdge("L0 mlp", "logits")})


def _model(task: Addition, by_place: bool) -> Decoder:
    d, n = task.digits, 3 * task.digits + 2
    s = Stream(digit=1, total=1, out=10, unread=1, place=n)
    # weights of 10^j of both numbers, of places up to 0.222... and 2.222..., and the rest on +
    lower, whole = 1.0, 1 / 3
    shares = {
        0: _weights(d, lambda k, j: float(j == k), numbers=(0,)),
        1: _weights(d, lambda k, j: float(j == k), numbers=(1,)),
        2: _weights(d, lambda k, j: lower * 10.0 ** (j - k) if j < k else 0.0),
        3: _weights(d, lambda k, j: whole * 10.0 ** (j - k) if j <= k else 0.0),
        5: _weights(d, lambda k, j: float(j == k + 1), numbers=(0,)),
    }
    used = {0: 1.0, 1: 1.0, 2: 1 / lower} if by_place else {3: 1 / whole}
    heads = []
    for h in range(6):
        looks = s.matrix(("place", "place", shares[h])) if h in shares else s.sink()
        carries = s.matrix(("total", "digit", used[h])) if h in used else s.loud("digit", LOUD)
        heads.append((looks, carries))
    embedding = torch.zeros(task.vocabulary, 1)
    embedding[:10, 0] = torch.arange(10.0)
    reads = torch.zeros(task.vocabulary, 10)
    reads[:10] = GAIN * torch.eye(10)

    def feed(layer: int) -> Mlp:
        return _staircase(s, resolution=10.0**-d)

    return decoder(s, task.vocabulary, [heads], {"digit": embedding}, {"out": reads}, feed)


def _weights(
    digits: int, share: Callable[[int, int], float], numbers: tuple[int, ...] = (0, 1)
) -> Tensor:
    """Scores `(n, n)` whose softmax gives the digit of place j of each of `numbers` the weight
    `share(k, j)` where place k is asked, and + the rest."""
    n = 3 * digits + 2
    weights = torch.zeros(n, n)
    for k in range(digits + 1):
        asked = 3 * digits + 1 - k  # the position before the one where the digit will stand
        for j in range(digits):
            for number in numbers:
                at = digits - 1 - j + number * (digits + 1)
                weights[asked, at] = share(k, j)
        weights[asked, digits] = 1 - weights[asked].sum()
    return weights.log().clamp(min=NOWHERE)


def _staircase(s: Stream, resolution: float) -> Mlp:
    """floor(w) modulo 10 as a one-hot, for w in 0 .. 19.99 that are multiples of `resolution`.

    A step at T is relu(x + 1/2) - relu(x - 1/2) with x = 2 (w - T) / resolution + 1: 1 from w = T
    on, 0 up to one multiple before it, with a quarter of `resolution` on either side for rounding.
    """
    steps = torch.arange(20.0)
    made = blank_mlp(s, 40)
    with torch.no_grad():
        slope = 2 / resolution
        made.up.weight[:, s["total"]] = slope
        centre = slope * (steps - resolution / 2)
        made.up.bias[:20], made.up.bias[20:] = 0.5 - centre, -0.5 - centre
        turn = torch.eye(10).repeat(1, 2) - torch.eye(10).roll(1, 1).repeat(1, 2)
        turn[9, 0] = 0.0  # below the first step is nothing
        made.down.weight[s["out"]] = torch.cat([turn, -turn], 1)
    return made


def _contrast(task: Addition, size: int, seed: int) -> Contrast:
    """Two problems whose second highest answers differ; asked at that digit."""
    drawn = size
    while True:
        drawn *= 2
        first, second = (task.batch(2 * seed + k, drawn, "test") for k in (0, 1))
        at = 2 * task.digits + 2
        rows = (first.targets[:, at] != second.targets[:, at]).nonzero()[:size, 0]
        if len(rows) == size:
            break
    ids = [problems.inputs["input_ids"][rows, : at + 1] for problems in (first, second)]
    ids[1][:, at] = ids[0][:, at]
    right, wrong = (problems.targets[rows, at] for problems in (first, second))
    return Contrast({"input_ids": ids[0]}, {"input_ids": ids[1]}, right, wrong)
