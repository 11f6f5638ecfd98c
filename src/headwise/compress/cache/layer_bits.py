"""Bits of the cache layer by layer: how much each layer feels them, and how to spend a budget.

Layers differ in what they lose to few bits, and so do keys and values of one layer, in a way that
is a property of the model more than of the text (KVTuner, Li et al. 2025, arXiv 2502.04420,
sections 4 and 5). So it is measured once: for every layer and pair (bits of keys, bits of values)
the relative error of what its heads give. Errors are taken as adding up over layers; then the best
table under a budget of mean bits is found exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.compress.cache.quantised import Coding
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.maps import attend
from headwise.models import AttentionReading, AttentionView, ModelView, observe

Pair = tuple[int, int]

PAIRS: tuple[Pair, ...] = tuple((k, v) for k in (8, 4, 2) for v in (8, 4, 2))
"""(bits of keys, bits of values) that are tried."""


@dataclass(frozen=True)
class LayerBits:
    """(bits of keys, bits of values) of every layer; `coding` says the rest."""

    pairs: tuple[Pair, ...]
    coding: Coding = field(default_factory=Coding)

    def __post_init__(self) -> None:
        for layer in range(len(self.pairs)):
            self.of(layer)

    def of(self, layer: int) -> Coding:
        """The coding of one layer."""
        keys, values = self.pairs[layer]
        return replace(self.coding, key_bits=keys, value_bits=values)

    @property
    def mean(self) -> float:
        """Mean bits of a number, ranges and the newest tokens apart."""
        return sum(k + v for k, v in self.pairs) / (2 * len(self.pairs))


Bits = int | Pair | Coding | LayerBits | list[int | Pair | Coding | None] | None
"""8, 4, 2 ... bits; (bits of keys, bits of values); how to code; a table; None: as they come; or a
list with one of these for each layer."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """`errors` `(layers, pairs)`: of `cache_sensitivity` the relative error of the heads' outputs
    of a layer, the norm of the difference over the norm, of all calibration tokens together; of
    `cache_divergence` what the predictions lose, in nats a token."""

    pairs: tuple[Pair, ...]
    errors: np.ndarray
    coding: Coding

    def allot(self, mean_bits: float) -> LayerBits:
        """The table of least added error whose mean bits are at most `mean_bits`.

        Raises ValueError, with the least that can be had, where no table is so small.
        """
        costs = [(k + v) / 2 for k, v in self.pairs]
        if mean_bits < min(costs):
            raise ValueError(
                f"mean_bits={mean_bits}: with the pairs {self.pairs} at least {min(costs):g} is "
                "reached"
            )
        chosen = least_error(self.errors, costs, mean_bits * len(self.errors))
        return LayerBits(tuple(self.pairs[c] for c in chosen), self.coding)

    def candidates(self, layer: int) -> list[Pair]:
        """The pairs of one layer that no other beats in both bits and error, most bits first."""
        costs = [k + v for k, v in self.pairs]
        return [self.pairs[i] for i in reversed(pareto(costs, self.errors[layer]))]


@torch.no_grad()
def cache_sensitivity(
    model: nn.Module | ModelView,
    inputs: Any,
    pairs: Sequence[Pair] = PAIRS,
    coding: Coding | None = None,
    **reading: Any,
) -> Sensitivity:
    """Measure every layer's self-attention with every pair on calibration text.

    Each layer is given its own exact inputs. All tokens but those that fill no group are coded,
    the newest too, which is harder than what a query of a real cache meets. `inputs`, `reading`:
    as for `read_examples` (texts with `tokenizer=` and the like). coding: the rest of the coding.

    Raises ValueError for a model without causal self-attention, or inputs without a whole group.
    """
    look = model_view(model)
    base = replace(coding or Coding(), residual=0)
    layers = cached_attentions(look)
    place = {attention: n for n, attention in enumerate(layers)}
    wrong = torch.zeros(len(layers), len(pairs), dtype=torch.float64)
    size = torch.zeros(len(layers), dtype=torch.float64)

    def read(seen: AttentionReading) -> None:
        at = place.get(seen.attention)
        if at is None:
            return
        if seen.key.shape[2] < base.group:
            raise ValueError(
                f"a text of {seen.key.shape[2]} tokens has no whole group of {base.group}: give "
                "longer ones, or coding=Coding(group=...)"
            )
        size[at] += seen.out.double().square().sum().cpu()
        for n, (keys, values) in enumerate(pairs):
            out = output_with(seen, replace(base, key_bits=keys, value_bits=values))
            wrong[at, n] += (out - seen.out).double().square().sum().cpu()

    with evaluating(look.model), observe(look, read):
        for batch in read_examples(look.model, inputs, **reading):
            look.model(**batch.given)
    errors = (wrong / size[:, None].clamp_min(1e-30)).sqrt().numpy()
    return Sensitivity(tuple(pairs), errors, coding or Coding())


def cached_attentions(look: ModelView) -> list[AttentionView]:
    """The self-attentions that a cache serves, in order of layers: those of the last stack."""
    found = [a for a in look.attentions if a.kind == "self" and a.stack == look.stacks[-1]]
    if not found:
        raise ValueError(f"{type(look.model).__name__} has no self-attention with a cache")
    return sorted(found, key=lambda a: a.layer)


def output_with(seen: AttentionReading, coding: Coding) -> Tensor:
    """`(batch, heads, n_q, value_dim)`: what the heads give from keys and values in codes."""
    batch = len(seen.key)
    store = coding.make(seen.key.flatten(0, 1), seen.value.flatten(0, 1))
    store.settle()
    keys, values = (t.unflatten(0, (batch, -1)) for t in store.whole())
    terms = seen.map.scores
    out, _ = attend(
        seen.query, keys, values, terms.pattern, terms.scale, terms.bias, terms.sinks, terms.softcap
    )
    return out


def pareto(costs: Sequence[float], errors: Sequence[float] | np.ndarray) -> list[int]:
    """The choices that no other beats in cost without being worse in error, by rising cost; of
    equal ones the first."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], float(errors[i]), i))
    found: list[int] = []
    for i in order:
        if not found or float(errors[i]) < float(errors[found[-1]]):
            found.append(i)
    return found


def least_error(
    errors: Sequence[Sequence[float]] | np.ndarray,
    costs: Sequence[float] | Sequence[Sequence[float]] | np.ndarray,
    budget: float,
) -> tuple[int, ...]:
    """One choice for each layer: the least sum of errors whose sum of costs is within the budget.

    errors: `(layers, choices)`; costs: `(choices,)` or `(layers, choices)`. Exact, by dynamic
    programming over the sums that are not beaten (few where costs are whole numbers, as bits
    are; `headwise.compress.allocate` is an integer program for costs of any kind).
    Raises ValueError, with the least cost there is, where nothing is within the budget.
    """
    table = np.asarray(errors, dtype=np.float64)
    prices = np.broadcast_to(np.asarray(costs, dtype=np.float64), table.shape)
    least = float(prices.min(1).sum())
    slack = 1e-9 * max(1.0, abs(budget))
    if least > budget + slack:
        raise ValueError(f"budget={budget:g}: the least that any choice costs is {least:g}")
    if not np.isfinite(table).all():
        raise ValueError("errors must be finite numbers")
    # what the layers to come cost at least, so that hopeless sums are left early
    ahead = np.append(np.cumsum(prices.min(1)[::-1])[::-1][1:], 0.0)
    states: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for layer, (error, price) in enumerate(zip(table, prices, strict=True)):
        grown = [
            (round(cost + float(price[c]), 9), wrong + float(error[c]), (*taken, c))
            for cost, wrong, taken in states
            for c in pareto([float(p) for p in price], error)
            if cost + float(price[c]) + ahead[layer] <= budget + slack
        ]
        kept = pareto([s[0] for s in grown], [s[1] for s in grown])
        states = [grown[i] for i in kept]
    return states[-1][2]  # most cost, least error


def codings(bits: Bits, layers: int) -> list[Coding | None]:
    """The coding of each of so many layers, None where entries stay as they come.

    Raises ValueError for another number of layers and for bits that cannot be, TypeError for what
    says no bits.
    """
    if isinstance(bits, LayerBits):
        found: list[Coding | None] = [bits.of(layer) for layer in range(len(bits.pairs))]
    elif isinstance(bits, list):
        found = [_coding(one) for one in bits]
    else:
        return [_coding(bits)] * layers
    if len(found) != layers:
        raise ValueError(
            f"bits of {len(found)} layers were given; the model has {layers}: give one for each "
            "(None: as they come), or one for all"
        )
    return found


def _coding(bits: int | Pair | Coding | None) -> Coding | None:
    if bits is None or isinstance(bits, Coding):
        return bits
    if isinstance(bits, int):
        return Coding(bits, bits)
    if isinstance(bits, tuple) and [type(b) for b in bits] == [int, int]:
        return Coding(*bits)
    raise TypeError(
        f"bits={bits!r}: expected a number, (bits of keys, bits of values), a Coding, LayerBits, "
        "None, or a list of these with one for each layer"
    )
