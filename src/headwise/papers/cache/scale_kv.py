"""A cache for images made from coarse to fine, with room where layers look back.

Visual autoregressive models draw one token map after another, each larger than the one before,
and every map looks at all earlier ones, so that the cache outgrows the model. Layers differ: some
("drafters") spread their attention over all earlier scales, others ("refiners") look at the map
that is being drawn and at few tokens before it. An index of how selective a layer is at a scale
tells them apart; then refiners get little room, less with every scale, and drafters
what that leaves. Which tokens stay is decided by the attention that a few queries spread over
the current map pay to them.

There is no such model here: layers are drawn at random as the paper describes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.maps import AttentionMap, attend
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture


def selectivity(look: AttentionMap, history: int, top: int = 8) -> Tensor:
    """ASI, a number: mean share of attention on the current map, times the mean sum of the `top`
    largest weights on the `history` keys before it. Equation 2 of the paper."""
    keys = torch.arange(look.scores.n_k)
    current = look.mass_on(keys >= history).mean()
    weights = look.rows(torch.arange(look.scores.n_q))[..., :history]
    return current * weights.topk(min(top, history), -1).values.sum(-1).mean()


def standardised(index: Tensor) -> Tensor:
    """Z-scores of `(layers, scales)` within each scale, equation 3."""
    return (index - index.mean(0)) / (index.std(0) + 1e-8)


@paper(
    title="Memory-Efficient Visual Autoregressive Modeling with Scale-Aware KV Cache Compression",
    source="arXiv 2505.19602",
    year=2025,
    modality="image",
    plain="Layers that look at all earlier scales get most of the cache, those that refine the "
    "current map get little, and less with every scale.",
    equation=r"\sum_k N^d_k B_d(k) + N^r_k B_r(k) = B L K, \quad B_r(k) = B_r(0) - \delta k",
    parts=("AttentionMap",),
    reported="The cache of Infinity-2B and 8B is brought to 10 % with the same GenEval and DPG "
    "scores.",
    unsure="Scores are averaged over heads (the paper says average pooling to one score of a "
    "layer). The total is kept within every scale here, over all scales in the paper; what a "
    "refiner starts with and how fast it falls (half of an even share, a sixteenth of it a "
    "scale) are ours. Layers are synthetic: there is no small pretrained model of this kind.",
    taxonomy=("beyond/cache",),
    use="""
import torch
from headwise.papers.cache.scale_kv import scale_budgets

index = torch.rand(8, 6)  # selectivity of 8 layers at 6 scales
room = scale_budgets(index, drafters=18, uniform=40)  # entries of each layer at each scale
""",
)
def scale_budgets(index: Tensor, drafters: int, uniform: int, start: float = 0.5) -> Tensor:
    """Entries `(layers, scales)` for a mean of `uniform`: the `drafters` pairs of lowest z-score
    share what refiners leave, who have `start` of an even share at first and 1/16 less of it with
    every scale."""
    layers, scales = index.shape
    drafts = is_drafter(index, drafters)
    falls = start * uniform * (1 - torch.arange(scales) / (2 * scales))
    refiner = falls.floor().long().clamp_min(1)
    room = refiner.expand(layers, -1).clone()
    for scale in range(scales):
        mine = drafts[:, scale]
        count = int(mine.sum())
        if count in (0, layers):
            room[:, scale] = uniform
        else:
            left = uniform * layers - int(refiner[scale]) * (layers - count)
            room[mine, scale] = left // count
    return room


def is_drafter(index: Tensor, count: int) -> Tensor:
    """`(layers, scales)`: the `count` pairs of lowest z-score."""
    z = standardised(index)
    chosen = torch.zeros(z.numel(), dtype=torch.bool)
    chosen[z.flatten().argsort()[:count]] = True
    return chosen.view_as(z)


def even_budgets(index: Tensor, drafters: int, uniform: int) -> Tensor:
    """The control: every layer has as much."""
    return torch.full(index.shape, uniform)


def reversed_budgets(index: Tensor, drafters: int, uniform: int) -> Tensor:
    """The control: selective layers are given the room."""
    return scale_budgets(-index, drafters, uniform)


@dataclass
class ScaleCache:
    """Keys and values `(heads, n, d)` of one layer, of the scales so far."""

    keys: Tensor
    values: Tensor

    def draw(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A new map attends to what is kept and to itself, `(heads, m, d)`, and joins it."""
        self.keys = torch.cat([self.keys, keys], 1)
        self.values = torch.cat([self.values, values], 1)
        return attend(queries[None], self.keys[None], self.values[None])[0][0]

    def cut(self, queries: Tensor, side: int, room: int, window: int = 16) -> None:
        """Keep `room` entries: up to `window` tokens spread over the map that was drawn last (with
        `queries`, `side` x `side`), at most half of the room, and what these look at most."""
        m, n = queries.shape[1], self.keys.shape[1]
        if n <= room:
            return
        seen = spread(side, min(window, room // 2))
        score = AttentionMap(queries[None][:, :, seen], self.keys[None]).received()[0].mean(0)
        score[n - m + seen] = float("inf")
        kept = score.topk(room).indices.sort().values
        self.keys, self.values = self.keys[:, kept], self.values[:, kept]


def spread(side: int, count: int) -> Tensor:
    """Places of the tokens in the middle of about `count` patches of a map."""
    patches = max(1, min(side, int(count**0.5)))
    middle = ((torch.arange(patches) + 0.5) * side / patches).long()
    return (middle[:, None] * side + middle).flatten()


# -- experiments ----------------------------------------------------------------------------------

SIDES = (1, 2, 3, 4, 5, 6, 8, 10)
LAYERS, HEADS, DIM = 8, 4, 32
DRAFTERS = (1, 4, 6)
SEEDS = (0, 1, 2)
FIRST = 3  # before that there is less than a tenth of all tokens, and nothing to cut


@cache
def drawn(seed: int) -> tuple[tuple[tuple[Tensor, Tensor, Tensor], ...], ...]:
    """Layer -> scale -> queries, keys, values `(heads, m, d)`. Three of the layers look back,
    for what a sixth of all tokens have, whatever their scale; the others at the current map, and
    with two fifths of their attention at the very first token."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def axis(*shape: int) -> Tensor:
        return 5 * F.normalize(normal(*shape, HEADS, 1, DIM), dim=-1)

    found = []
    for layer in range(LAYERS):
        own, wanted, first = axis(len(SIDES)), axis(), axis()
        scales = []
        for scale, side in enumerate(SIDES):
            m = side * side
            q, k, v = (normal(HEADS, m, DIM) for _ in range(3))
            if layer in DRAFTERS:
                marked = (torch.rand(m, 1, generator=random) < 1 / 6).float()
                q, k = q / 2 + wanted - own[scale], k + marked * wanted + own[scale]
            else:
                # as much as m keys of the current map together, nearly
                strength = (25 / DIM**0.5 + math.log(m)) * DIM**0.5 / 25
                q = q / 2 + own[scale] + strength * first
                k = k + own[scale] + (first if scale == 0 else 0.0)
            scales.append((q, k, v))
        found.append(tuple(scales))
    return tuple(found)


@cache
def index_of(seed: int) -> Tensor:
    """Selectivity `(layers, scales - FIRST)`."""
    table = torch.zeros(LAYERS, len(SIDES) - FIRST)
    for layer, scales in enumerate(drawn(seed)):
        for scale in range(FIRST, len(SIDES)):
            keys = torch.cat([scales[s][1] for s in range(scale + 1)], 1)
            look = AttentionMap(scales[scale][0][None], keys[None])
            table[layer, scale - FIRST] = selectivity(look, keys.shape[1] - SIDES[scale] ** 2)
    return table


def error(room: Tensor, seed: int) -> float:
    """Relative squared error of all outputs, when room[l, s - FIRST] stay after scale s."""
    wrong = whole = 0.0
    for layer, scales in enumerate(drawn(seed)):
        none = torch.zeros(HEADS, 0, DIM)
        full, less = ScaleCache(none, none), ScaleCache(none, none)
        for scale, (q, k, v) in enumerate(scales):
            want, got = full.draw(q, k, v), less.draw(q, k, v)
            wrong += float((got - want).square().sum())
            whole += float(want.square().sum())
            if FIRST <= scale < len(SIDES) - 1:
                less.cut(q, SIDES[scale], int(room[layer, scale - FIRST]))
    return wrong / whole


ROOM = sum(side * side for side in SIDES) // 10


def by_depth(seed: int) -> Tensor:
    """The control: layers in their order, as in PyramidKV, where the lower ones get more."""
    return torch.arange(float(LAYERS))[:, None].expand(-1, len(SIDES) - FIRST)


@claim(subject=index_of, control=by_depth, unit="share of right roles", seeds=SEEDS)
def drafters_are_found(index: Callable[[int], Tensor], seed: int) -> Measured:
    """The layers that look back are those of lowest standardised index at every scale."""
    table = index(seed)
    found = is_drafter(table, len(DRAFTERS) * table.shape[1])
    right = torch.zeros_like(found)
    right[list(DRAFTERS)] = True
    return at_least((found == right).double().mean(), 0.95)


@claim(control=reversed_budgets, unit="error by that of even budgets", seeds=SEEDS)
def the_same_memory_is_better_spent(budgets: Callable[..., Tensor], seed: int) -> Measured:
    """With a tenth of the cache, the error is at most 0.7 of what an even split of the same memory
    gives (0.31 to 0.59 over five draws; half was expected)."""
    index = index_of(seed)
    drafts = len(DRAFTERS) * index.shape[1]
    even = error(even_budgets(index, drafts, ROOM), seed)
    found = error(budgets(index, drafts, ROOM), seed)
    return at_most(found / even, 0.7, error=found, even=even)


def generous(index: Tensor, drafters: int, uniform: int) -> Tensor:
    """The control: drafters get theirs, and nobody gives."""
    return scale_budgets(index, drafters, uniform).clamp_min(uniform)


@claim(control=generous, unit="entries over an even split, share", seeds=SEEDS)
def no_more_memory_is_used(budgets: Callable[..., Tensor], seed: int) -> Measured:
    """At no scale have the layers together more entries than with even budgets, and nearly all of
    them are given out."""
    index = index_of(seed)
    room = budgets(index, len(DRAFTERS) * index.shape[1], ROOM).sum(0) / (ROOM * LAYERS)
    return at_most(float(room.max()) - 1, 0.0, least=float(room.min()))


@picture
def error_by_room() -> Picture:
    """What is lost with less and less cache."""
    total = sum(side * side for side in SIDES)
    shares = [0.05, 0.1, 0.2, 0.3, 0.5, 0.8]
    index = index_of(0)
    made = {
        "by role (ScaleKV)": scale_budgets,
        "even (control)": even_budgets,
        "reversed (control)": reversed_budgets,
    }
    lines = {
        name: (
            shares,
            [error(give(index, len(DRAFTERS) * index.shape[1], int(s * total)), 0) for s in shares],
        )
        for name, give in made.items()
    }
    return Picture(
        title="What a smaller cache costs, by how its room is dealt to layers and scales",
        x="share of the tokens kept",
        y="relative squared error of outputs",
        lines=lines,
    )
