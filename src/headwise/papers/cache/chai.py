"""Heads that look alike share one map: one keeps its keys, all keep their values.

Many heads of a layer give nearly the same weights to the same tokens. The paper clusters them:
beforehand it finds how many clusters each layer needs, at the elbow of the clustering error; when
a text comes, the maps of its first five tokens tell which heads belong together. From then on one
head of a cluster computes the map for all, and the others need no queries and no keys; their keys
leave the cache. Values stay every head's own, since heads that look at the same tokens still read
different things from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from headwise.compress import ClusteredCache, HeadClusters
from headwise.compress.cache.head_clusters import cluster, clustering_error, elbow, map_correlations
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture, within
from headwise.papers.embedded import divergence, embedded_model, embedded_text
from headwise.train import seeded

SEEDS = (0, 1, 2)
HEADS = 8
PAIRS = ((0, 5), (1, 2), (3, 7), (4, 6))


@paper(
    title="CHAI: Clustered Head Attention for Efficient LLM Inference",
    source="arXiv 2403.08058",
    year=2024,
    modality="text",
    plain="Heads whose maps agree on the first tokens share the map and the keys of one of them.",
    equation=r"o_h = \mathrm{softmax}\left( q_{r(h)} K_{r(h)}^{\top} / \sqrt{d} \right) V_h",
    parts=("ClusteredCache", "HeadClusters"),
    reported="Up to 21 % less memory for keys and values and 1.7 times less latency, at most 3.2 "
    "points of accuracy lost.",
    unsure="Clusters are made around medoids by correlation, where the paper takes k-means and "
    "then a head of each cluster. With grouped heads, key-value heads are clustered.",
    needs=("transformers",),
    taxonomy=("beyond/cache",),
    use="""
from headwise.papers.cache.chai import chai
from headwise.papers.embedded import embedded_model, embedded_text

with chai(embedded_model(), counts=(4, 3, 3, 4)) as cache:
    embedded_model()(embedded_text(1, 64), past_key_values=cache)
    print(cache.nbytes())
""",
)
def chai(model: Any, counts: Sequence[int], seed: int = 0) -> ClusteredCache:
    """A cache with `counts` clusters in each layer, found by every text's first five tokens."""
    return ClusteredCache(model, list(counts))


def drawn_clusters(counts: Sequence[int], seed: int) -> HeadClusters:
    """Clusters of heads drawn by chance, of as many heads as the model at hand has."""
    made = torch.Generator().manual_seed(seed)
    heads = HEADS if len(counts) == 2 else 4
    tables = []
    for k in counts:
        order = torch.randperm(heads, generator=made).tolist()
        table = {h: h for h in order[:k]} | {h: order[i % k] for i, h in enumerate(order[k:])}
        tables.append(tuple(table[h] for h in range(heads)))
    return HeadClusters(tuple(tables))


def any_clusters(model: Any, counts: Sequence[int], seed: int = 0) -> ClusteredCache:
    """The control: as many clusters, of heads drawn by chance."""
    return ClusteredCache(model, drawn_clusters(counts, seed))


Maker = Callable[..., Any]


@cache
def planted(seed: int) -> Any:
    """A model of two layers whose heads have the queries and keys of another, in pairs."""
    with seeded(seed):
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=HEADS,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.3)
            for layer in model.model.layers:
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    lines = part.weight.view(HEADS, -1, 64)
                    for a, b in PAIRS:
                        lines[b] = lines[a]
    return model


def words(seed: int) -> torch.Tensor:
    return torch.randint(1, 64, (4, 40), generator=torch.Generator().manual_seed(50 + seed))


@claim(control=any_clusters, unit="share of heads", seeds=SEEDS)
@torch.no_grad()
def five_tokens_tell_who_looks_alike(make: Maker, seed: int) -> Measured:
    """In a model with four pairs of heads of the same queries and keys, every sequence's first
    five tokens put each head together with its twin, and with no other."""
    twin = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
    with make(planted(seed), (4, 4), seed) as held:
        planted(seed)(words(seed)[:, :5], past_key_values=held)
        found = [
            {other for other in range(HEADS) if table[other] == table[head]} == {head, twin[head]}
            for layer in held.layers
            for table in layer.cluster_of.tolist()
            for head in range(HEADS)
        ]
    return at_least(sum(found) / len(found), 1.0)


@claim(control=any_clusters, unit="largest difference of logits", seeds=SEEDS)
@torch.no_grad()
def twins_lose_nothing(make: Maker, seed: int) -> Measured:
    """With half of the keys gone, that model's logits are what they were, while decoding too."""
    model, ids = planted(seed), words(seed)
    want = model(ids, use_cache=False).logits
    with make(model, (4, 4), seed) as held:
        steps = [model(part, past_key_values=held).logits for part in ids.split([30, *[1] * 10], 1)]
    return at_most((torch.cat(steps, 1) - want).abs().max() / want.abs().max(), 1e-4)


def plain(model: Any, counts: Sequence[int], seed: int = 0) -> Any:
    """The control: transformers' cache, of all keys."""
    return DynamicCache(config=model.config)


@claim(control=plain, unit="share of the bytes")
@torch.no_grad()
def keys_leave_the_cache(make: Maker, seed: int) -> Measured:
    """A further token takes half of the keys and all of the values: three quarters of the bytes,
    counted in the tensors."""
    model, sizes = planted(seed), []
    for tokens in (20, 40):
        held = make(model, (4, 4), seed)
        model(words(seed)[:, :tokens], past_key_values=held)
        if isinstance(held, ClusteredCache):
            sizes.append(held.nbytes())
            held.close()
        else:
            sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers))
    whole = 4 * 20 * 2 * 64 * 2 * 4
    return within((sizes[1] - sizes[0]) / whole, 0.75, 0.01)


LIKE, DRAWS = 0.4, 12


@cache
def by_maps(seed: int) -> tuple[HeadClusters, ...]:
    """In each layer of the embedded model as few clusters as leave every head a correlation of
    0.4 or more with the one that stands for it, on text of its own."""
    found = map_correlations(embedded_model(), embedded_text(12, 128, 12 * seed))
    tables = []
    for table in found:
        every = [cluster(table, k) for k in range(1, len(table) + 1)]
        like = (of for of in every if min(float(table[h, r]) for h, r in enumerate(of)) >= LIKE)
        tables.append(next(like))
    return (HeadClusters(tuple(tables)),)


def by_chance(seed: int) -> tuple[HeadClusters, ...]:
    """The control: as many clusters in each layer, drawn, many times over."""
    (found,) = by_maps(seed)
    return tuple(drawn_clusters(found.counts, 1000 + 100 * seed + n) for n in range(DRAWS))


@cache
def lost(clusters: HeadClusters, seed: int) -> float:
    """What predictions lose with these clusters, in nats a token."""
    with ClusteredCache(embedded_model(), clusters) as held:
        return divergence(embedded_text(4, 160, 60 + 4 * seed), 120, held)


def mean_lost(several: tuple[HeadClusters, ...], seed: int) -> float:
    return sum(lost(one, seed) for one in several) / len(several)


@claim(control=by_chance, subject=by_maps, unit="nats of chance", seeds=SEEDS, quick=False)
def likeness_matters_in_a_trained_model(
    find: Callable[[int], tuple[HeadClusters, ...]], seed: int
) -> Measured:
    """In a trained model, where some layers have heads that look alike and some have none,
    predictions lose at most 0.7 of what they lose where as many clusters are drawn (mean of
    12)."""
    (found,) = by_maps(seed)
    drawn = tuple(drawn_clusters(found.counts, 100 * seed + n) for n in range(DRAWS))
    chance, mine = mean_lost(drawn, seed), mean_lost(find(seed), seed)
    return at_most(mine / chance, 0.7, nats=mine, chance=chance, kept_keys=found.kept_keys)


@picture
def error_by_clusters() -> Picture:
    """Error of clustering by the number of clusters, layer by layer, in the planted model."""
    lines = {}
    for layer, table in enumerate(map_correlations(planted(0), words(0))):
        errors = [clustering_error(table, cluster(table, k)) for k in range(1, HEADS + 1)]
        lines[f"layer {layer}: elbow at {elbow(errors)}"] = (list(range(1, HEADS + 1)), errors)
    return Picture(
        title="Error of clustering eight heads, planted in four pairs",
        x="clusters in a layer",
        y="sum of 1 - correlation over heads",
        lines=lines,
    )
