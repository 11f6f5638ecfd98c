"""Every layer gets the bits of keys and values that it needs, found once and then fixed.

How much a layer's heads lose to few bits differs from layer to layer by orders of magnitude, and
in a layer keys and values do not lose alike; both belong to the model more than to the text. So
the pair (bits of keys, bits of values) of each layer is tuned beforehand: what is lost is
measured for every pair, pairs that another beats in both bits and error go, layers
that react alike are put together, and the groups' pairs are searched under a budget of mean bits.
At run time there is a table and nothing to decide.

What is measured for a pair here is the divergence of the predictions, not the relative error of
the heads' outputs, by which the paper prunes: in the embedded model that error is smaller with two
bits for keys and four for values than the other way round, and the predictions are many times
worse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np

from headwise.compress import HeadCache, LayerBits, cache_divergence
from headwise.compress.cache.layer_bits import Pair, Sensitivity, least_error, pareto
from headwise.papers import Measured, Picture, at_most, claim, paper, picture, within
from headwise.papers.embedded import divergence, embedded_model, embedded_text

MEAN = 3.5
SEEDS = (0, 1, 2)


def alike(found: Sensitivity, near: float = 0.5) -> list[list[int]]:
    """Layers with the same candidates whose errors are within a factor of e ** near of another's
    of their group (what DBSCAN gives that calls no layer noise)."""
    layers = range(len(found.errors))
    errors = np.log(np.maximum(found.errors, 1e-12))
    group = list(layers)
    for a, b in itertools.combinations(layers, 2):
        close = float(np.abs(errors[a] - errors[b]).mean()) <= near
        if close and found.candidates(a) == found.candidates(b):
            group = [group[a] if g == group[b] else g for g in group]
    return [[n for n in layers if group[n] == g] for g in dict.fromkeys(group)]


@paper(
    title="KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for "
    "Efficient and Nearly Lossless LLM Inference",
    source="arXiv 2502.04420",
    year=2025,
    modality="text",
    plain="The bits of every layer's cached keys and values are chosen once by how much the "
    "layer's heads lose, under a budget of mean bits.",
    equation=r"\min_{(k_l, v_l)} \sum_l e_l(k_l, v_l), \quad "
    r"\frac{1}{2L} \sum_l (k_l + v_l) \le B",
    parts=("HeadCache", "LayerBits", "Coding"),
    reported="Nearly lossless at a mean of 3.25 bits for Llama-3.1-8B and 4 bits for Qwen2.5-7B; "
    "up to 21 % more throughput than 8 bits for all.",
    unsure="The paper searches the groups' pairs by accuracy with Optuna; here their added errors "
    "are searched, exactly. Errors are of predictions instead of the heads' outputs.",
    taxonomy=("beyond/cache", "beyond/compression"),
    use="""
from headwise.compress import HeadCache
from headwise.papers.cache.kvtuner import kvtuner, measured
from headwise.papers.embedded import embedded_model

bits = kvtuner(measured(), 4.0)
cache = HeadCache(embedded_model(), bits=bits)
""",
)
def kvtuner(found: Sensitivity, mean_bits: float) -> LayerBits:
    """The table of pairs for a budget, from measured errors."""
    groups = alike(found)
    errors = np.array([found.errors[group].sum(0) for group in groups])
    costs = np.array([[len(group) * (k + v) / 2 for k, v in found.pairs] for group in groups])
    chosen = least_error(errors, costs, mean_bits * len(found.errors))
    pairs = [found.pairs[0]] * len(found.errors)
    for group, choice in zip(groups, chosen, strict=True):
        for layer in group:
            pairs[layer] = found.pairs[choice]
    return LayerBits(tuple(pairs), found.coding)


def dealt_backwards(found: Sensitivity, mean_bits: float) -> LayerBits:
    """The control: the same pairs, the one with most bits to the layer that needs bits least."""
    tuned = kvtuner(found, mean_bits)
    need = np.argsort(np.argsort([_gain(found, n) for n in range(len(tuned.pairs))]))
    order = sorted(tuned.pairs, key=sum, reverse=True)
    return LayerBits(tuple(order[rank] for rank in need), tuned.coding)


def _gain(found: Sensitivity, layer: int) -> float:
    """What two bits more for values spare a layer."""
    errors, pairs = found.errors[layer], found.pairs
    return float(errors[pairs.index((4, 2))] - errors[pairs.index((4, 4))])


Tuner = Callable[[Sensitivity, float], LayerBits]


@cache
def measured() -> Sensitivity:
    """What the embedded model's predictions lose, by layer and pair."""
    return cache_divergence(embedded_model(), embedded_text(4, 320))


@cache
def cost(bits: LayerBits, seed: int) -> float:
    """What predictions lose on text that nothing was measured on, in nats a token."""
    with HeadCache(embedded_model(), bits=bits) as held:
        return divergence(embedded_text(4, 320, 20 + 4 * seed), 256, held)


def keys_first(layers: int) -> LayerBits:
    """Of six bits for a key and its value, four for the key."""
    return LayerBits(((4, 2),) * layers)


def values_first(layers: int) -> LayerBits:
    """The control: four for the value."""
    return LayerBits(((2, 4),) * layers)


@claim(control=values_first, subject=keys_first, unit="nats of the reverse", seeds=SEEDS)
def keys_need_more_bits_than_values(favour: Callable[[int], LayerBits], seed: int) -> Measured:
    """Of six bits for a key and its value, four for the key cost predictions at most a third of
    what four for the value cost (ranges by channel for keys, by token for values)."""
    first, reverse = cost(keys_first(4), seed), cost(values_first(4), seed)
    mine = cost(favour(4), seed)
    return at_most(mine / (reverse if mine == first else first), 1 / 3, keys_first=first)


def non_dominated(found: Sensitivity, layer: int) -> list[Pair]:
    """The pairs that the paper keeps."""
    return found.candidates(layer)


def equal_pairs(found: Sensitivity, layer: int) -> list[Pair]:
    """The control: keys and values always alike, as everybody's caches have it."""
    return [(8, 8), (4, 4), (2, 2)]


@claim(control=equal_pairs, subject=non_dominated, unit="largest relative excess")
def pruning_pairs_loses_nothing(
    keep: Callable[[Sensitivity, int], list[Pair]], seed: int
) -> Measured:
    """Of all tables of four layers (6561), those on the front of bits and error are found among
    the pairs that were kept: at no budget is the least error larger."""
    found = measured()

    def front(kept: list[list[int]]) -> dict[float, float]:
        best: dict[float, float] = {}
        for taken in itertools.product(*kept):
            bits = sum(sum(found.pairs[c]) for c in taken) / (2 * len(taken))
            error = sum(float(found.errors[n, c]) for n, c in enumerate(taken))
            best[bits] = min(best.get(bits, np.inf), error)
        return best

    layers = range(len(found.errors))
    everything = front([list(range(len(found.pairs)))] * len(layers))
    some = front([[found.pairs.index(p) for p in keep(found, n)] for n in layers])
    excess = 0.0
    costs = sorted(everything)
    for at in pareto(costs, [everything[c] for c in costs]):
        within_budget = min(error for bits, error in some.items() if bits <= costs[at] + 1e-9)
        excess = max(excess, within_budget / everything[costs[at]] - 1)
    return at_most(excess, 1e-9)


@claim(control=dealt_backwards, unit="nats of the reverse", seeds=SEEDS)
def bits_go_where_they_are_needed(tune: Tuner, seed: int) -> Measured:
    """At a mean of 3.5 bits predictions lose at most 0.7 of what they lose where the same pairs
    are dealt to the layers in the reverse order, in a cache that really holds them."""
    reverse = cost(dealt_backwards(measured(), MEAN), seed)
    mine = cost(tune(measured(), MEAN), seed)
    return at_most(mine / reverse, 0.7, tuned=mine, reverse=reverse)


def unpacked(found: Sensitivity, mean_bits: float) -> None:
    """The control: numbers are rounded, and held in 32 bits."""


@claim(control=unpacked, unit="bits of a number")
def the_bytes_are_those_of_the_table(tune: Callable[..., LayerBits | None], seed: int) -> Measured:
    """Each further token takes the tuned mean of 3.5 bits of a number and one for ranges, within
    half a bit, counted in the cache."""
    model, sizes = embedded_model(), []
    for tokens in (528, 1040):
        ids = embedded_text(1, 1040, 3)[:, :tokens]
        with HeadCache(model, bits=tune(measured(), MEAN)) as held:
            model.model(ids, past_key_values=held)
            sizes.append(held.nbytes() - 4 * 4 * 4 * tokens)  # without places
    return within(8 * (sizes[1] - sizes[0]) / (512 * 4 * 4 * 32 * 2), MEAN + 1.0, 0.5)


@picture
def loss_by_bits() -> Picture:
    """What predictions lose by mean bits, layers added: tuned, and one pair everywhere."""
    found = measured()
    budgets = [2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0]

    def error(bits: LayerBits) -> float:
        return sum(
            float(found.errors[n, found.pairs.index(pair)]) for n, pair in enumerate(bits.pairs)
        )

    lines = {"tuned (KVTuner)": (budgets, [error(kvtuner(found, budget)) for budget in budgets])}
    alike, fewer = ((2, 2), (4, 4), (8, 8)), ((2, 4), (2, 8), (4, 8))
    for name, pairs in {"keys as values (control)": alike, "keys below values": fewer}.items():
        tables = [LayerBits((pair,) * 4) for pair in pairs]
        lines[name] = ([table.mean for table in tables], [error(table) for table in tables])
    return Picture(
        title="What predictions lose with fewer bits: a pair for each layer, one pair for all",
        x="mean bits of a cached number (pairs exist at the marks only)",
        y="KL, nats a token",
        lines=lines,
        log="y",
    )
