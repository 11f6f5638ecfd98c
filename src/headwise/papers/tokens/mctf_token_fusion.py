"""Tokens are fused if they are alike, say little and stand for few patches: all three at once.

Merging the most similar pair loses most where both are important, and joins what has been joined
before into ever larger lumps. MCTF multiplies three criteria for a pair: similarity of the tokens,
how little attention they receive, and how few patches are in them, each with a temperature. Pairs
are matched in both directions between two halves of the tokens, and pooled by received attention
times size. The attention is read one step ahead: the next layer's own map over the tokens as they
are, before they are fused, so that what is important is so for the layer that comes; summed over
fused keys and averaged over fused queries, that same map serves for the fused tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headwise.compress import Reduction, reduce_tokens
from headwise.compress.tokens.matching import Similarity, averaged, cosines, matched, numbered
from headwise.compress.tokens.record import Record
from headwise.compress.tokens.reduction import joined
from headwise.compress.tokens.sight import Sight, with_special
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.papers.digit_readers import held_out_digits, trained_reader


@paper(
    title="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision "
    "Transformers",
    source="arXiv 2403.10030",
    year=2024,
    modality="image",
    plain="Pairs of tokens are fused by similarity, by how little attention they receive in the "
    "layer to come, and by how few patches they hold.",
    equation=r"W_{ij} = \Big(\tfrac{\cos(x_i, x_j) + 1}{2}\Big)^{1/\tau_s} "
    r"\Big(\tfrac{1}{a_i a_j}\Big)^{1/\tau_a} \Big(\tfrac{1}{s_i s_j}\Big)^{1/\tau_z}",
    parts=("Attention",),
    reported="DeiT-T and DeiT-S: 44 % fewer FLOPs with 0.5 and 0.3 points more accuracy, after 30 "
    "epochs with a consistency loss between two rates of fusion.",
    unsure="Form and temperatures (1, 20, 40) are those of the authors' code. The attention of the "
    "fused tokens is computed anew (a mode of their code, more exact); `fused_map` gives the map "
    "that the paper computes with instead. The consistency loss is left out.",
    taxonomy=("beyond/tokens",),
    use="""
from headwise.papers.digit_readers import held_out_digits, trained_reader
from headwise.papers.tokens.mctf_token_fusion import mctf

with mctf(trained_reader(0), fused=4, layers=(1, 2)) as record:
    logits = trained_reader(0)(held_out_digits()[0])
record.members(2)  # which patches each token of the first image holds
""",
)
@dataclass(frozen=True)
class MultiCriteria(Reduction):
    """Fusion of pairs by similarity, information and size; a temperature of 0 leaves a criterion
    out. `both_ways`: half of the pairs from the first side to the second, half back."""

    similarity: float = 1.0
    information: float = 20.0
    size: float = 40.0
    both_ways: bool = True
    proportional: bool = True
    place: ClassVar[str] = "before"

    def pair_scores(self, tokens: Tensor, received: Tensor, sizes: Tensor) -> Tensor:
        """`(batch, n, n)` of tokens `(batch, n, width)`, their mean received attention and their
        sizes `(batch, n)`. Factors that all pairs of an image share are left out."""
        scores = torch.ones_like(received[:, :, None] * received[:, None])
        if self.similarity:
            scores = ((cosines(tokens) + 1) / 2).clamp_min(0) ** (1 / self.similarity)
        for values, temperature in ((received, self.information), (sizes, self.size)):
            if temperature:
                scores = scores * (values[:, :, None] * values[:, None]) ** (-1 / temperature)
        return scores

    def __call__(self, tokens: Tensor, sight: Sight, k: int) -> tuple[Tensor, Tensor]:
        received = sight.received().mean(1).clamp_min(1e-12)
        scores = self.pair_scores(tokens.detach(), received, sight.sizes)
        gone = tokens.shape[1] - k
        groups = matched_both_ways(scores, gone, sight.special) if self.both_ways else matched(
            scores, gone, sight.special)  # fmt: skip
        return averaged(tokens, received * sight.sizes, groups, k), groups


def matched_both_ways(scores: Tensor, gone: int, shift: int = 0) -> Tensor:
    """Groups `(batch, n)`: half of the pairs go from the first side to the second, the others from
    the second to what is left of the first, by the same scores. Patch i is on the first side
    where i + shift is even."""
    batch, n, _ = scores.shape
    order = torch.arange(n)
    first, second = order[(order + shift) % 2 == 0], order[(order + shift) % 2 == 1]
    there = gone // 2
    pairs = scores[:, first][:, :, second]
    best, partner = pairs.max(-1)
    ranked = best.argsort(1, descending=True)
    sources = ranked[:, :there]
    leader = order.expand(batch, n).clone()
    leader.scatter_(1, first[sources], second[partner.gather(1, sources)])
    left = pairs.scatter(1, sources[:, :, None].expand(-1, -1, len(second)), -torch.inf)
    best, partner = left.max(1)
    sources = best.topk(gone - there, 1).indices
    leader.scatter_(1, second[sources], first[partner.gather(1, sources)])
    return numbered(leader.gather(1, leader))  # one may have led another before it was led


def fused_map(whole: Tensor, groups: Tensor, weights: Tensor, m: int) -> Tensor:
    """The map `(batch, heads, n, n)` for fused tokens `(batch, heads, m, m)`: keys of a group are
    summed, queries averaged by `weights` `(batch, n)`; every token has a group."""
    keys = torch.stack([joined(one.transpose(1, 2), groups, m) for one in whole.unbind(1)], 1)
    rows = [averaged(one.transpose(1, 2), weights, groups, m) for one in keys.unbind(1)]
    return torch.stack(rows, 1)


def mctf(
    model: Any, fused: int, layers: tuple[int, ...], how: Reduction | None = None
) -> AbstractContextManager[Record]:
    """A vision encoder that makes `fused` fewer tokens before each of these layers (one layer
    counted after the other from all of its patches, `model.tokens` with one class token)."""
    patches = model.tokens - 1
    schedule = {layer: patches - fused * (i + 1) for i, layer in enumerate(sorted(layers))}
    return reduce_tokens(model, schedule=schedule, how=how or MultiCriteria())


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


def by_similarity() -> Reduction:
    """The control: similarity alone decides."""
    return MultiCriteria(information=0.0, size=0.0)


@dataclass(frozen=True)
class AnyPairs(MultiCriteria):
    """The control: pairs are drawn at random."""

    def pair_scores(self, tokens: Tensor, received: Tensor, sizes: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(tokens.shape[1])
        return torch.rand(*received.shape, received.shape[1], generator=random) + 0.5


Make = Callable[[], Reduction]


def sight_of(keys: Tensor, query: Tensor, special: int = 1) -> Sight:
    """One head over tokens with these keys `(n, d)`; every query is the same."""
    n = len(keys)
    queries = query.expand(1, 1, n, -1)
    ones = torch.ones(1, n - special)
    return Sight(queries, keys[None, None], keys[None, None], 1.0, special, True, ones, None,
                 True, 0, 1)  # fmt: skip


@claim(control=by_similarity, unit="share of the important tokens that stay alone")
def important_twins_stay_two(make: Make, seed: int) -> Measured:
    """20 pairs of twins (cosine above 0.99) draw most of the attention, 20 pairs of cousins (about
    0.9) hardly any: 20 fusions leave 9 of 10 twins alone. By similarity the twins go first."""
    random = torch.Generator().manual_seed(seed)
    parents = torch.randn(40, 32, generator=random)
    noise = torch.randn(40, 32, generator=random)
    spread = torch.cat([torch.full((20, 1), 0.05), torch.full((20, 1), 0.45)])
    tokens = torch.stack([parents, parents + spread * noise], 1).flatten(0, 1)  # neighbours
    asked = torch.zeros(81, 4)
    asked[1:41, 0] = 3.0
    sight = sight_of(asked, torch.tensor([1.0, 0, 0, 0]))
    groups = make()(tokens[None], sight, 60)[1][0]
    alone = (groups[:40, None] == groups[None]).sum(1) == 1
    return at_least(float(alone.float().mean()), 0.9)


@claim(control=AnyPairs, unit="share of the tokens in another group than ToMe's")
def without_its_criteria_it_is_tome(make: Make, seed: int) -> Measured:
    """One direction and similarity alone give the groups of bipartite soft matching on the same
    features."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(41, 8, generator=random)
    sight = sight_of(keys, 2 * torch.randn(8, generator=random))
    chosen: Any = make()
    plain = replace(chosen, information=0.0, size=0.0, both_ways=False)
    theirs = Similarity()(keys[None, 1:], sight, 28)[1]
    ours = plain(keys[None, 1:], sight, 28)[1]
    return at_most(float((ours != theirs).float().mean()), 0.0)


@claim(control=AnyPairs, unit="largest difference")
def twins_attend_alike_when_fused(make: Make, seed: int) -> Measured:
    """Where the tokens of a group are the same, the fused map is the map of the fused tokens with
    keys that count by size, to 1e-6; groups of different tokens give another one."""
    random = torch.Generator().manual_seed(seed)
    twins = torch.randn(10, 8, generator=random).repeat_interleave(2, 0)
    keys = torch.cat([torch.randn(1, 8, generator=random), twins])
    sight = replace(sight_of(keys, keys[0]), queries=keys[None, None])
    small, groups = make()(twins[None], sight, 10)
    every = torch.cat([torch.zeros(1, 1, dtype=torch.long), groups + 1], 1)
    sizes = with_special(joined(torch.ones(1, 20), groups, 10), 1)
    found = fused_map(sight.map().dense(), every, torch.ones(1, 21), 11)
    tokens = torch.cat([keys[None, :1], small], 1)
    want = (tokens @ tokens.transpose(1, 2) + sizes.log()[:, None]).softmax(-1)
    return at_most(float((found[:, 0] - want).abs().max()), 1e-6)


@claim(control=AnyPairs, unit="nats of divergence", seeds=SEEDS, quick=False)
def fusing_hardly_moves_the_answer(make: Make, seed: int) -> Measured:
    """6 of 16 patches fused away before the first layer, without training for it: the answer moves
    by at most 0.15 nats on average from that of all patches, by twice as much with pairs drawn at
    random. (Similarity alone does as well here; the criteria pay where twins matter, see above.)
    """
    model, (images, _) = trained_reader(seed), held_out_digits()
    with torch.no_grad():
        whole = model(images).log_softmax(-1)
        with mctf(model, 6, (0,), make()):
            less = model(images).log_softmax(-1)
    divergence = (whole.exp() * (whole - less)).sum(-1).mean()
    same = (whole.argmax(-1) == less.argmax(-1)).float().mean()
    return at_most(float(divergence), 0.15, same=float(same))


@picture
def divergence_by_fused() -> Picture:
    """How far the answer moves as more patches are fused away before the first layer."""
    model, (images, _) = trained_reader(0), held_out_digits()
    counts = [2, 4, 6, 8, 10, 12]
    ways: dict[str, Make] = {
        "three criteria (MCTF)": MultiCriteria,
        "similarity (control)": by_similarity,
        "drawn pairs (control)": AnyPairs,
    }
    lines: dict[str, tuple[list[int], list[float]]] = {}
    with torch.no_grad():
        whole = model(images).log_softmax(-1)
        for name, make in ways.items():
            moved = []
            for count in counts:
                with mctf(model, count, (0,), make()):
                    less = model(images).log_softmax(-1)
                moved.append(float((whole.exp() * (whole - less)).sum(-1).mean()))
            lines[name] = (counts, moved)
    return Picture(
        title="How far a digit reader's answer moves as patches are fused, without training",
        x="patches of 16 fused away",
        y="KL from all patches, nats",
        lines=lines,
    )
