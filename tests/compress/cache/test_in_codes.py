"""Products with codes against products with what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.compress import Coding
from headwise.compress.cache.in_codes import InCodes
from headwise.compress.cache.quantised import FEW, Quantised


def stored(rows: int, n: int, d: int, d_v: int, seed: int, **coding: Any) -> Quantised:
    """Everything in codes; keys with some channels that are large, as models have them."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, n, d, generator=draw) * (1 + 8 * torch.rand(d, generator=draw))
    values = torch.randn(rows, n, d_v, generator=draw) + 1
    store = Coding(residual=0, **coding).make(keys, values)
    store.settle()
    return store


def kept(store: Quantised, count: int, seed: int) -> Quantised:
    """What an eviction leaves, other tokens of every row."""
    draw = torch.Generator().manual_seed(seed)
    rows = len(store.whole()[0])
    some = [torch.randperm(store.length, generator=draw)[:count].sort().values for _ in range(rows)]
    return store.select(torch.stack(some))


def exact(store: Quantised, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values that the codes stand for, and those that came as they are, as float64."""
    k, v = store._keys.piece(start, stop).double(), store._values.piece(start, stop).double()
    outliers = store._outliers
    for row, places in enumerate(outliers.at.content.tolist()):
        for number, place in enumerate(places):
            if start <= place < stop:
                k[row, place - start] = outliers.keys.content[row, number]
                v[row, place - start] = outliers.values.content[row, number]
    return k, v


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 4, 7, 32]),
    d=st.integers(1, 40),
    d_v=st.integers(1, 40),
    count=st.integers(1, 6),
    bits=st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 2),
    keys=st.sampled_from(["channel", "token"]),
    evicted=st.booleans(),
    outliers=st.integers(0, 2),
    kind=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_products_with_codes_are_those_with_what_they_stand_for(
    rows: int, groups: int, group: int, d: int, d_v: int, count: int, bits: tuple[int, int],
    keys: str, evicted: bool, outliers: int, kind: torch.dtype, seed: int,
) -> None:  # fmt: skip
    n = groups * group
    store = stored(rows, n, d, d_v, seed, key_bits=bits[0], value_bits=bits[1], group=group,
                   keys=keys, outliers=min(outliers, group - 1))  # fmt: skip
    assert store.coded == n
    if evicted:
        store = kept(store, max(1, n // 2), seed)
    draw = torch.Generator().manual_seed(seed)
    # where tokens of a range are neighbours a piece starts and stops with whole groups
    step = 1 if evicted else group
    cuts = torch.randint(0, store.coded // step + 1, (2,), generator=draw).sort().values * step
    start, stop = int(cuts[0]), int(cuts[1])
    if start == stop:
        start, stop = 0, store.coded
    piece = InCodes(store._keys, store._values, store._outliers, start, stop)
    asked = torch.randn(rows, count, d, generator=draw).to(kind)
    weights = torch.rand(rows, count, stop - start, generator=draw).to(kind)
    k, v = exact(store, start, stop)
    scores, summed = piece.scores(asked), piece.summed(weights)
    assert scores.dtype == summed.dtype == kind
    assert len(piece) == stop - start
    within = 1e-5 * float(k.abs().sum(-1).max() + 1)
    torch.testing.assert_close(scores.double(), asked.double() @ k.mT, rtol=1e-4, atol=within)
    within = 1e-5 * float(v.abs().max() * weights.sum(-1).max() + 1)
    torch.testing.assert_close(summed.double(), weights.double() @ v, rtol=1e-4, atol=within)


@pytest.mark.parametrize("keys", ["channel", "token"])
def test_few_queries_meet_codes_and_many_meet_numbers(keys: str) -> None:
    store = stored(3, 64, 16, 16, 0, keys=keys)
    assert all(isinstance(piece, InCodes) for piece in store.pieces(FEW))
    assert not any(isinstance(piece, InCodes) for piece in store.pieces(FEW + 1))
    asked = torch.randn(3, 2, 16)
    few, many = (torch.cat([p.scores(asked) for p in store.pieces(c)], -1) for c in (1, FEW + 1))
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-3)
