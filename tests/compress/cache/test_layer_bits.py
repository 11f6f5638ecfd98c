"""Sensitivities against dense attention in float64, tables against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.compress.bits.allocation import allocate as integer_program
from headwise.compress.cache.layer_bits import (
    PAIRS,
    LayerBits,
    Sensitivity,
    cache_sensitivity,
    cached_attentions,
    codings,
    least_error,
    pareto,
)
from headwise.compress.cache.quantised import Coding
from headwise.models import observe, view
from tests.instruments import tiny


def cut(x: Tensor, bits: int, dim: int) -> Tensor:
    low, high = x.amin(dim, True), x.amax(dim, True)
    scale = (high - low) / (2**bits - 1)
    return low + ((x - low) / scale).round() * scale


def test_errors_are_those_of_dense_attention() -> None:
    model = tiny.llama()
    ids = torch.randint(1, tiny.VOCABULARY, (2, 37), generator=torch.Generator().manual_seed(0))
    coding = Coding(group=8, residual=20, scales=torch.float32)
    pairs = ((8, 2), (2, 8), (4, 4))
    found = cache_sensitivity(model, ids, pairs, coding)
    assert found.coding == coding
    seen: dict[int, tuple[Tensor, ...]] = {}

    def read(r: object) -> None:
        seen[r.attention.layer] = (r.query.double(), r.key.double(), r.value.double())  # type: ignore[attr-defined]

    with torch.no_grad(), observe(view(model), read):
        model(ids)
    for layer, (q, k, v) in seen.items():

        def heads(k: Tensor, v: Tensor, q: Tensor = q) -> Tensor:
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            scores = q @ k.mT * q.shape[-1] ** -0.5
            scores = scores + torch.full((37, 37), -torch.inf).triu(1)
            return scores.softmax(-1) @ v

        exact = heads(k, v)
        for n, (bk, bv) in enumerate(pairs):
            kq, vq = k.clone(), v.clone()
            for start in range(0, 32, 8):
                kq[:, :, start : start + 8] = cut(k[:, :, start : start + 8], bk, 2)
            vq[:, :, :32] = cut(v[:, :, :32], bv, 3)  # 8 channels: one group
            want = float((heads(kq, vq) - exact).norm() / exact.norm())
            assert found.errors[layer, n] == pytest.approx(want, rel=0.02)


def test_more_bits_cost_less_error() -> None:
    ids = torch.randint(1, tiny.VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(0))
    found = cache_sensitivity(tiny.llama(), ids)
    table = {pair: found.errors[:, n] for n, pair in enumerate(PAIRS)}
    assert (table[8, 8] < table[4, 4]).all()
    assert (table[4, 4] < table[2, 2]).all()
    assert (table[8, 8] < 0.05).all()


def test_layers_of_a_decoder_alone_are_meant() -> None:
    layers = cached_attentions(view(tiny.bart()))
    assert {a.stack for a in layers} == {"decoder"}
    assert {a.kind for a in layers} == {"self"}
    assert [a.layer for a in layers] == [0, 1]


TABLES = st.integers(1, 5).flatmap(
    lambda layers: st.lists(
        st.lists(st.floats(0, 10, allow_nan=False), min_size=3, max_size=3),
        min_size=layers,
        max_size=layers,
    )
)


@settings(max_examples=80, deadline=None)
@given(TABLES, st.floats(2, 8.5), st.sampled_from([(8, 4, 2), (5.0, 3.3, 2.1), (4, 4, 2)]))
def test_the_best_table_is_found(
    errors: list[list[float]], mean: float, costs: tuple[float, ...]
) -> None:
    layers, budget = len(errors), mean * len(errors)
    possible = [
        (sum(errors[at][c] for at, c in enumerate(taken)), sum(costs[c] for c in taken))
        for taken in itertools.product(range(3), repeat=layers)
    ]
    within = [error for error, cost in possible if cost <= budget + 1e-9]
    if not within:
        with pytest.raises(ValueError, match="the least that any choice costs"):
            least_error(errors, costs, budget)
        return
    taken = least_error(errors, costs, budget)
    assert sum(costs[c] for c in taken) <= budget + 1e-6
    assert sum(errors[at][c] for at, c in enumerate(taken)) == pytest.approx(min(within), abs=1e-6)


def test_as_an_integer_program_with_costs_of_each_layer() -> None:
    pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(0)
    errors, costs = random.exponential(size=(12, 5)), random.integers(1, 30, size=(12, 5))
    for budget in (80, 130, 220):
        taken = least_error(errors, costs, budget)
        answer = integer_program(costs, errors, budget)
        both = [sum(errors[at, c] for at, c in enumerate(one)) for one in (taken, answer)]
        assert both[0] == pytest.approx(both[1], abs=1e-6)
        assert sum(costs[at, c] for at, c in enumerate(taken)) <= budget


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=9))
def test_nothing_on_the_front_is_beaten_and_all_else_is(points: list[tuple[int, int]]) -> None:
    costs, errors = [p[0] for p in points], [float(p[1]) for p in points]
    front = pareto(costs, errors)
    assert [costs[i] for i in front] == sorted({costs[i] for i in front})
    for i, (cost, error) in enumerate(points):
        beaten = any(
            c <= cost and e <= error and (c, e) != (cost, error) for c, e in points
        ) or any((c, e) == (cost, error) for c, e in points[:i])
        assert (i in front) == (not beaten)


def test_a_table_from_measured_errors() -> None:
    errors = np.array([[0.0, 0.1, 0.2, 0.9], [0.0, 0.01, 0.3, 0.02]])
    found = Sensitivity(((8, 8), (4, 4), (2, 8), (2, 2)), errors, Coding(group=16))
    bits = found.allot(3.0)
    assert bits.pairs == ((4, 4), (2, 2))
    assert bits.mean == 3.0
    assert bits.of(0) == Coding(4, 4, group=16)
    assert found.candidates(0) == [(8, 8), (4, 4), (2, 2)]
    assert found.candidates(1) == [(8, 8), (4, 4), (2, 2)]
    with pytest.raises(ValueError, match="at least 2"):
        found.allot(1.5)


def test_bits_as_a_user_writes_them() -> None:
    assert codings(None, 2) == [None, None]
    assert codings(4, 2) == [Coding(4, 4)] * 2
    assert codings((8, 4), 2) == [Coding(8, 4)] * 2
    assert codings(Coding(2, 2, group=8), 1) == [Coding(2, 2, group=8)]
    assert codings([(8, 4), (2, 2)], 2) == [Coding(8, 4), Coding(2, 2)]
    assert codings(LayerBits(((8, 4),)), 1) == [Coding(8, 4)]
    mixed = [8, None, Coding(2, 4, residual=0), (4, 2)]
    assert codings(mixed, 4) == [Coding(8, 8), None, Coding(2, 4, residual=0), Coding(4, 2)]
    with pytest.raises(ValueError, match="bits of 1 layers"):
        codings(LayerBits(((8, 4),)), 2)
    with pytest.raises(ValueError, match="key_bits=5"):
        LayerBits(((5, 4),))
    with pytest.raises(TypeError, match=r"bits=2\.5"):
        codings(2.5, 2)  # type: ignore[arg-type]


def test_short_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole group of 32"):
        cache_sensitivity(tiny.llama(), torch.randint(1, 50, (1, 20)))
