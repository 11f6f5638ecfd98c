"""Addition modulo p with waves of a few frequencies."""

from __future__ import annotations

from itertools import combinations
from math import pi

import torch
from torch import Tensor

from headwise.models.backbones.decoder import Decoder
from headwise.parts.feed.gated import Gated
from headwise.parts.feed.mlp import Mlp
from headwise.tasks.circuits.known import Contrast, KnownCircuit, KnownEdge
from headwise.tasks.circuits.stream import Stream, blank_mlp, decoder
from headwise.tasks.modular import ModularArithmetic

MARGIN = 10.0
"""Logit of the answer over that of the next best."""


def modular_fourier(p: int = 23, waves: int = 3) -> KnownCircuit:
    """What Nanda et al. 2023 (arXiv 2301.05217, section 4) found in a trained model, as weights.

    Numbers are embedded as cosines and sines of 2 pi k / p times the number, for `waves`
    frequencies k. L0H0 brings those of a, L0H1 those of b to the sign =. The feed-forward layer
    multiplies them (neurons of one frequency each): cos(a + b) = cos a cos b - sin a sin b. The
    logit of c is the sum of cos(2 pi k (a + b - c) / p), highest where all waves meet. The layer
    is bilinear (Shazeer 2020, arXiv 2002.05202), so that the products are exact; the paper's has
    ReLU.

    Raises ValueError for an even p (pairs of problems need twice anything to be something).

    `facts["frequencies"]`: the k. The control embeds numbers as themselves and has a neuron for
    each pair (a, b), a table without any wave; there L0H2 and L0H3 bring a and b.
    """
    if p % 2 == 0:
        raise ValueError(f"modular_fourier needs an odd p, not {p}")
    task = ModularArithmetic(p)
    frequencies = _spread(p, waves)
    return KnownCircuit(
        name="modular addition by waves",
        model=_waves(task, frequencies),
        task=task,
        heads=frozenset({(0, 0), (0, 1)}),
        feeds=frozenset({0}),
        edges=_edges(0, 1),
        decoys={
            (0, 2): "looks at a, and nobody reads it",
            (0, 3): "looks at b, and nobody reads it",
        },
        contrast=lambda size, seed: _contrast(task, size, seed),
        control=lambda: _control(task),
        facts={"frequencies": frequencies},
    )


def _control(task: ModularArithmetic) -> KnownCircuit:
    return KnownCircuit(
        name="modular addition by a table",
        model=_table(task),
        task=task,
        heads=frozenset({(0, 2), (0, 3)}),
        feeds=frozenset({0}),
        edges=_edges(2, 3),
        decoys={
            (0, 0): "looks at a, and nobody reads it",
            (0, 1): "looks at b, and nobody reads it",
        },
        contrast=lambda size, seed: _contrast(task, size, seed),
    )


def _edges(*heads: int) -> frozenset[KnownEdge]:
    brought = {KnownEdge("embed", f"L0H{head}.v") for head in heads}
    read = {KnownEdge(f"L0H{head}", "L0 mlp") for head in heads}
    return frozenset({*brought, *read, KnownEdge("L0 mlp", "logits")})


def _waves(task: ModularArithmetic, frequencies: tuple[int, ...]) -> Decoder:
    p, count = task.p, len(frequencies)
    s = Stream(wave=2 * count, a=2 * count, b=2 * count, sum=2 * count, unread=2 * count, place=4)
    waves = _table_of_waves(p, frequencies)
    embedding = torch.cat([waves, torch.zeros(2, 2 * count)])  # the signs are no numbers
    gap = float((count - (waves @ waves[0])[1:]).min())
    heads = _heads(s, "wave", (0, 1))

    def feed(layer: int) -> Gated:
        return _products(s, count)

    reads = {"sum": embedding * MARGIN / gap}
    return decoder(s, task.vocabulary, [heads], {"wave": embedding}, reads, feed)


def _products(s: Stream, count: int) -> Gated:
    """For each frequency cos a cos b - sin a sin b and sin a cos b + cos a sin b."""
    made = Gated(s.width, 4 * count, activation=lambda x: x)
    cosine, sine = torch.eye(2 * count).split(count)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.gate.weight[:, s["a"]] = torch.cat([cosine, sine, sine, cosine])
        made.up.weight[:, s["b"]] = torch.cat([cosine, sine, cosine, sine])
        i = torch.eye(count)
        o = torch.zeros_like(i)
        made.down.weight[s["sum"]] = torch.cat(
            [torch.cat([i, -i, o, o], 1), torch.cat([o, o, i, i], 1)]
        )
    return made


def _table(task: ModularArithmetic) -> Decoder:
    p = task.p
    s = Stream(number=p, a=p, b=p, sum=p, unread=p, place=4)
    embedding = torch.eye(p + 2, p)
    heads = _heads(s, "number", (2, 3))

    def feed(layer: int) -> Mlp:
        made = blank_mlp(s, p * p)
        a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
        with torch.no_grad():
            made.up.weight[:, s["a"]], made.up.weight[:, s["b"]] = torch.eye(p)[a], torch.eye(p)[b]
            made.up.bias.fill_(-1.0)  # both
            made.down.weight[s["sum"]] = torch.eye(p)[(a + b) % p].T
        return made

    reads = {"sum": MARGIN * embedding}
    return decoder(s, task.vocabulary, [heads], {"number": embedding}, reads, feed)


def _heads(s: Stream, source: str, used: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Four heads: 0 and 2 look at a, 1 and 3 at b; those used write where it is read."""
    places = [s.matrix(s.always("place", torch.eye(4)[at])) for at in (0, 2, 0, 2)]
    targets = {used[0]: "a", used[1]: "b"}
    return [
        (place, s.matrix((targets[h], source, 1.0)) if h in targets else s.loud(source))
        for h, place in enumerate(places)
    ]


def _table_of_waves(p: int, frequencies: tuple[int, ...]) -> Tensor:
    """Cosines, then sines `(p, 2 frequencies)` of every number."""
    angle = 2 * pi / p * torch.arange(p)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def _spread(p: int, count: int) -> tuple[int, ...]:
    """The frequencies whose waves tell numbers apart best."""

    def worst(chosen: tuple[int, ...]) -> float:
        table = _table_of_waves(p, chosen)
        return float((table @ table[0])[1:].max())

    return min(combinations(range(1, (p + 1) // 2), count), key=worst)


def _contrast(task: ModularArithmetic, size: int, seed: int) -> Contrast:
    """Both numbers are moved on by the same."""
    generator = task.generator(seed, "test")
    clean = torch.randint(task.p, (size, 2), generator=generator)
    moved = torch.randint(1, task.p, (size, 1), generator=generator)
    corrupted = (clean + moved) % task.p

    def line(pair: Tensor) -> dict[str, Tensor]:
        sign = torch.full_like(pair[:, 0], task.p)
        return {"input_ids": torch.stack([pair[:, 0], sign, pair[:, 1], sign + 1], 1)}

    right, wrong = clean.sum(1) % task.p, corrupted.sum(1) % task.p
    return Contrast(line(clean), line(corrupted), right, wrong)
