"""Attention, retold by many heads of which each moves one feature, and few speak at a time.

A layer of attention moves more features than it has heads: a head carries several, and one feature
may be spread over heads whose maps are mixtures (attention superposition). The paper trains a
replacement for the layer, on its inputs and outputs alone: many more heads, each of which reads one
direction and writes one direction (rank-1 OV), maps shared in groups (a QK of ordinary rank for
each), and at every token only the K heads that speak loudest are heard. Sparsity is what makes a
head mean one thing.

The layer here is planted: six features, three of them taken from the token before and three from
the token itself, but its two heads' maps are 3:1 and 1:3 mixtures of the two, so that every
feature stands in both heads. As in the authors' program, maps start from the layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.models import AttentionView, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, at_least, at_most, claim, paper
from headwise.parts import Attention
from headwise.train import seeded


@paper(
    title="Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition",
    source="arXiv 2504.20938",
    year=2025,
    modality="text",
    plain="Replace a layer of attention by many heads with one value dimension each, maps shared "
    "in groups, of which only the K loudest are heard at a token.",
    equation=r"z_h(t) = \sum_s A_{g(h)}(t,s)\, w_V^h \cdot x_s, \quad y(t) = "
    r"\sum_{h \in \mathrm{TopK}(|z(t)|)} z_h(t)\, w_O^h",
    parts=("Attention",),
    reported="Thousands of heads a layer of Pythia 160M and Llama 3.1 8B: finer induction and "
    "successor heads, arithmetic heads; as interpretable as a sparse autoencoder.",
    unsure="Loudness is |z| here, with w_O of norm 1; the program has other activations beside it, "
    "and biases and rotation, which are left out.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.lens.lorsa import Lorsa, fitted, inputs, planted

layer = planted(0)  # an attention of any model, by headwise.models.view
sparse = Lorsa.like(layer, groups=4, heads=12, k=2)
fitted(sparse, layer.module, inputs(0), steps=10)
""",
)
class Lorsa(nn.Module):
    """Low-rank sparse attention, causal.

    query, key `(groups, head_dim, width)`; read (w_V), write (w_O) `(heads, width)`, of which head
    h uses the map of group h // (heads / groups). `k`: heads that are heard at each token.
    """

    def __init__(self, query: Tensor, key: Tensor, read: Tensor, write: Tensor, k: int) -> None:
        super().__init__()
        if len(read) % len(query) or not 1 <= k <= len(read):
            raise ValueError(
                f"Lorsa needs heads in equal groups and 1 <= k <= heads, not {len(read)} heads in "
                f"{len(query)} groups with k={k}"
            )
        self.query = nn.Parameter(query.detach().clone())
        self.key = nn.Parameter(key.detach().clone())
        self.read = nn.Parameter(read.detach().clone())
        self.write = nn.Parameter(write.detach().clone())
        self.k = k

    @classmethod
    def exactly(cls, attention: AttentionView) -> Lorsa:
        """The layer itself: each of its heads is a group of `value_dim` heads of rank 1, all of
        them heard. Raises ValueError for a layer with biases: they have no place here."""
        a = attention
        biases = a.query_bias(), a.key_bias(), a.value_bias(), a.output_bias()
        if any(bias is not None for bias in biases):
            raise ValueError(f"{a.name} has biases, which Lorsa's heads have not: fit one instead")
        shared = a.heads // a.kv_heads
        read = a.value_weight().repeat_interleave(shared, 0).flatten(0, 1)
        write = a.output_weight().mT.flatten(0, 1)
        keys = a.key_weight().repeat_interleave(shared, 0)
        return cls(a.query_weight(), keys, read, write, len(read))

    @classmethod
    def like(cls, attention: AttentionView, groups: int, heads: int, k: int) -> Lorsa:
        """To be fitted: maps from the layer's heads in turn, directions at random."""
        exact = cls.exactly(attention)
        own = torch.arange(groups) % len(exact.query)
        read = torch.randn(heads, attention.width) / attention.width**0.5
        write = F.normalize(torch.randn(heads, attention.width), dim=-1)
        return cls(exact.query[own], exact.key[own], read, write, k)

    def maps(self, x: Tensor) -> Tensor:
        """x `(batch, n, width)` to `(batch, groups, n, n)`."""
        q = torch.einsum("bnw,gdw->bgnd", x, self.query)
        k = torch.einsum("bnw,gdw->bgnd", x, self.key)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
        return scores.softmax(-1)

    def activations(self, x: Tensor) -> Tensor:
        """z of every head, heard or not: `(batch, n, heads)`."""
        values = (x @ self.read.T).unflatten(-1, (len(self.query), -1))
        return torch.einsum("bgts,bsgr->btgr", self.maps(x), values).flatten(2)

    def sources(self, x: Tensor, head: int) -> Tensor:
        """What each token gives to one head's z: `(batch, n, n)`, whose rows sum to z."""
        group = head // (len(self.read) // len(self.query))
        return self.maps(x)[:, group] * (x @ self.read[head])[:, None]

    def forward(self, x: Tensor) -> Tensor:
        z = self.activations(x)
        if self.k < z.shape[-1]:
            loud = z.abs() * self.write.norm(dim=-1)
            z = z * torch.zeros_like(z).scatter(-1, loud.topk(self.k, -1).indices, 1.0)
        return z @ self.write


# -- a layer in which the truth is known ----------------------------------------------------------

SEEDS = (0, 1, 2)
LENGTH, READS, FEATURES, RATE = 10, 12, 6, 0.12
WIDTH = LENGTH + READS
"""The place of a token, then what it holds; the first half of the features comes from the token
before. A feature is there with probability RATE."""


def random_layer(width: int, heads: int, seed: int) -> AttentionView:
    """An attention as it is before training."""
    with seeded(seed):
        model = Decoder(
            8, width, 1, lambda layer: Attention(width, heads, causal=True), lambda layer: None
        )
    return view(model.eval()).attentions[0]


@cache
def directions(seed: int) -> tuple[Tensor, Tensor]:
    """What features are read and written by, `(features, width)` each, of norm 1. Reading ones are
    orthogonal, writing ones are not."""
    random = torch.Generator().manual_seed(seed)
    read = torch.linalg.qr(torch.randn(READS, READS, generator=random))[0][:FEATURES]
    write = F.normalize(torch.randn(FEATURES, WIDTH, generator=random), dim=-1)
    return F.pad(read, (LENGTH, 0)), write


@cache
@torch.no_grad()
def planted(seed: int) -> AttentionView:
    """Two heads. P and S being what goes through the previous and the same token, their OVs are
    1.5 P - 0.5 S and 1.5 S - 0.5 P, behind maps of 3:1 and 1:3: in sum, P from before and S from
    the token itself."""
    a = random_layer(WIDTH, 2, seed)
    read, write = directions(seed)
    for weight in (a.query_weight(), a.key_weight(), a.value_weight(), a.output_weight()):
        weight.zero_()
    places = torch.arange(LENGTH)
    scale = math.sqrt(a.head_dim)
    for head, lead in enumerate((math.log(3), 0.0)):
        a.key_weight()[head, places, places] = 1.0
        a.query_weight()[head, places[:-1], places[1:]] = scale * (20 + lead)
        a.query_weight()[head, places, places] = scale * (20 + math.log(3) - lead)
        mine = torch.tensor([1.5, -0.5] if head == 0 else [-0.5, 1.5])
        a.value_weight()[head, :FEATURES] = read
        a.output_weight()[head, :, :FEATURES] = (mine.repeat_interleave(3)[:, None] * write).T
    return a


def inputs(seed: int, count: int = 512, drawn: int = 0) -> Tensor:
    """Tokens that hold few of a layer's features each, `(count, n, width)`."""
    random = torch.Generator().manual_seed(1000 + drawn)
    there = torch.rand(count, LENGTH, FEATURES, generator=random) < RATE
    held = there * (0.5 + torch.rand(there.shape, generator=random))
    place = F.pad(torch.eye(LENGTH), (0, READS))
    return held @ directions(seed)[0] + place


def fitted(
    sparse: Lorsa,
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int = 600,
    rate: float = 1e-2,
    size: int = 64,
    seed: int = 0,
) -> Lorsa:
    """Trained in place to give what the layer gives, w_O kept at norm 1."""
    with torch.no_grad():
        wanted = layer(x)
    adam = torch.optim.Adam(sparse.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (size,), generator=random)
        adam.zero_grad()
        (sparse(x[rows]) - wanted[rows]).square().sum(-1).mean().backward()
        adam.step()
        schedule.step()
        with torch.no_grad():
            sparse.write.copy_(F.normalize(sparse.write, dim=-1))
    return sparse


@cache
def sparsely(seed: int, k: int = 2) -> Lorsa:
    """Twelve heads in four groups, two of them heard."""
    with seeded(seed):
        sparse = Lorsa.like(planted(seed), 4, 12, k)
    return fitted(sparse, planted(seed).module, inputs(seed), seed=seed)


def densely(seed: int) -> Lorsa:
    """The control: all heads are heard."""
    return sparsely(seed, 12)


class SameToken(Lorsa):
    """Every head looks at the token itself."""

    def maps(self, x: Tensor) -> Tensor:
        return torch.eye(x.shape[1]).expand(len(x), len(self.query), -1, -1)


@cache
def at_the_token(seed: int) -> Lorsa:
    """The control: heads see only the token itself, as a sparse autoencoder of tokens does."""
    with seeded(seed):
        sparse = SameToken.like(planted(seed), 4, 12, 2)
    return fitted(sparse, planted(seed).module, inputs(seed), seed=seed)


@torch.no_grad()
def explained(sparse: Lorsa, seed: int) -> float:
    """Share of the variance of the layer's answers to new inputs."""
    x = inputs(seed, 256, drawn=1)
    wanted = planted(seed).module(x)
    return 1 - float(
        (sparse(x) - wanted).square().sum() / (wanted - wanted.mean((0, 1))).square().sum()
    )


@torch.no_grad()
def agreement(sparse: Lorsa, seed: int) -> Tensor:
    """How well the best head of each feature is it, `(features,)`: the cosine of w_O, or the share
    of its map on the token that the feature comes from, whichever is less. What it reads is not
    asked for: w_V learns to look past the other features."""
    wrote = (F.normalize(sparse.write, dim=-1) @ directions(seed)[1].T).abs()
    maps = sparse.maps(inputs(seed, 64, drawn=1)).mean(0)
    before = maps.diagonal(-1, -2, -1).mean(-1)
    same = maps[:, 1:, 1:].diagonal(0, -2, -1).mean(-1)
    looks = torch.stack([before] * 3 + [same] * 3, -1)
    return wrote.minimum(looks.repeat_interleave(len(wrote) // len(looks), 0)).amax(0)


def one_map(attention: AttentionView) -> Lorsa:
    """The control: all heads share the first one's map."""
    exact = Lorsa.exactly(attention)
    return Lorsa(exact.query[:1], exact.key[:1], exact.read, exact.write, exact.k)


@claim(subject=Lorsa.exactly, control=one_map, unit="largest difference", seeds=SEEDS)
@torch.no_grad()
def any_attention_is_made_of_such_heads(
    make: Callable[[AttentionView], Lorsa], seed: int
) -> Measured:
    """Four heads of 8 dimensions are 32 heads of rank 1 in four groups, all heard, to 1e-5."""
    layer = random_layer(32, 4, seed)
    x = 3 * torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed))
    return at_most((make(layer)(x) - layer.module(x)).abs().max(), 1e-5)


@claim(subject=sparsely, control=at_the_token, unit="share of variance", seeds=SEEDS)
def two_heads_at_a_time_explain_the_layer(make: Callable[[int], Lorsa], seed: int) -> Measured:
    """Two heads heard at a token explain 0.9 of the variance on new inputs; heads that see only
    the token itself do not."""
    return at_least(explained(make(seed), seed), 0.9, all_heard=explained(densely(seed), seed))


@claim(subject=sparsely, control=densely, unit="features found", seeds=SEEDS)
def heads_are_the_features(make: Callable[[int], Lorsa], seed: int) -> Measured:
    """At least 5 of 6 features have a head of their own: 0.9 of cosine and of map. With all heads
    heard the layer is told as well, but by heads that mean nothing."""
    found = agreement(make(seed), seed)
    return at_least((found >= 0.9).sum(), 5.0, least=found.min(), mean=found.mean())


def the_layers_own(seed: int) -> Lorsa:
    return Lorsa.exactly(planted(seed))


@claim(subject=the_layers_own, control=sparsely, unit="agreement", seeds=SEEDS)
def the_layers_own_heads_are_not(make: Callable[[int], Lorsa], seed: int) -> Measured:
    """No value dimension of the layer's own heads is any feature better than 0.8, though each
    writes in one feature's direction: their maps are mixtures."""
    return at_most(agreement(make(seed), seed).max(), 0.8)
