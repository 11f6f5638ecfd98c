"""Attention over blocks is the attention over what is in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.compress.cache.block import Block
from headwise.compress.cache.block_attention import Query, attend_block
from headwise.compress.cache.buffer import Buffer
from headwise.compress.cache.store import Plain
from tests.compress.cache.models import reference


class Tiled(Plain):
    """A store that hands over its entries in pieces of three, as a packed one does."""

    def tiles(self):  # type: ignore[no-untyped-def]
        keys, values = super().whole()
        for start in range(0, keys.shape[1], 3):
            yield keys[:, start : start + 3], values[:, start : start + 3]


def ragged(rows: int, n: int, m: int, gaps: bool, seed: int) -> Tensor:
    """Places `(rows, n + m)` of n old entries, some of them not valid, and m new ones."""
    torch.manual_seed(seed)
    old = torch.stack([torch.randperm(3 * n + 1)[:n].sort().values for _ in range(rows)])
    new = torch.arange(3 * n + 1, 3 * n + 1 + m).expand(rows, m)
    if gaps and n:
        old = old.masked_fill(torch.rand(rows, n) < 0.3, -1)
    return torch.cat([old, new], 1).to(torch.int32)


def attended(
    rows: int,
    g: int,
    n: int,
    m: int,
    gaps: bool,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    store: type[Plain],
    seed: int,
) -> tuple[Tensor, Tensor]:
    places = ragged(rows, n, m, gaps, seed)
    d, width = 8, 5
    keys, values = torch.randn(rows, n + m, d), torch.randn(rows, n + m, width)
    q = torch.randn(rows, g, m, d)
    learned = torch.randn(rows, g) if sinks else None
    block = Block.of(store.make(keys, values, 4), places, gaps, 4)
    asked = Query(q, places[:, n:], 0.4, softcap, learned, window)
    got = attend_block(asked, block)
    expected = torch.zeros(rows, g, m, width, dtype=torch.float64)
    for row in range(rows):
        query, key = places[row, n:, None], places[row][None]
        seen = (key >= 0) & (key <= query)
        if window is not None:
            seen &= key > query - window
        own = None if learned is None else learned[row]
        expected[row] = reference(q[row], keys[row], values[row], seen, 0.4, softcap, own)
    return got, expected


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    g=st.integers(1, 3),
    n=st.integers(0, 12),
    m=st.integers(1, 5),
    gaps=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 20)),
    softcap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
    store=st.sampled_from([Plain, Tiled]),
    seed=st.integers(0, 1000),
)
def test_few_queries(**case: object) -> None:
    got, expected = attended(**case)  # type: ignore[arg-type]
    assert torch.allclose(got.double(), expected, atol=1e-5)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 10])
def test_many_queries(gaps: bool, sinks: bool, softcap: float | None, window: int | None) -> None:
    for store in (Plain, Tiled):
        got, expected = attended(2, 2, 11, 37, gaps, window, softcap, sinks, store, 3)
        assert torch.allclose(got.double(), expected, atol=1e-5)


def test_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.compress.cache.block_attention.SCORES", 64)
    got, expected = attended(2, 2, 11, 7, True, 10, None, False, Plain, 3)
    assert torch.allclose(got.double(), expected, atol=1e-5)
    got, expected = attended(1, 1, 60, 3, False, None, None, False, Plain, 3)  # one at a time
    assert torch.allclose(got.double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values, q = torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.randn(2, 3, 1, 8)
    places = torch.arange(9).expand(2, 9).to(torch.int32)
    block = Block.of(Plain.make(keys.to(dtype), values.to(dtype)), places, False)
    got = attend_block(Query(q.to(dtype), places[:, 8:], 0.4), block)
    seen = torch.ones(1, 9, dtype=torch.bool)
    expected = [reference(q[r], keys[r], values[r], seen, 0.4) for r in range(2)]
    assert got.dtype == dtype
    assert torch.allclose(got.double(), torch.stack(expected), atol=3e-2)


def test_a_buffer_grows_and_moves() -> None:
    torch.manual_seed(0)
    content = torch.randn(3, 40, 2)
    buffer = Buffer.copied(content[:, :30], 4)
    for at in range(30, 40):
        buffer.append(content[:, at : at + 1])
    assert torch.equal(buffer.content, content)
    indices = torch.stack([torch.randperm(40)[:25].sort().values for _ in range(3)])
    expected = torch.stack([content[row, indices[row]] for row in range(3)])
    assert torch.equal(buffer.select(indices, 3).content, expected)
    assert torch.equal(buffer.content, content)  # as it was
    place = buffer.held.data_ptr()
    moved = buffer.keep(indices, 20)
    assert torch.equal(moved.content, expected)
    assert moved.held.data_ptr() == place  # within the buffer
    assert Buffer(content, 40, lent=True).keep(indices, 15).held.data_ptr() != content.data_ptr()


def test_many_rows_are_selected_at_once() -> None:
    content = torch.randn(20, 9, 2)
    indices = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(20)])
    got = Buffer.copied(content, 2).select(indices, 3)
    assert torch.equal(got.content, torch.stack([content[r, indices[r]] for r in range(20)]))
    some = torch.tensor([3, 17])
    part = Buffer.copied(content, 2).select(indices[some], 1, some)
    assert torch.equal(part.content, got.content[some])
