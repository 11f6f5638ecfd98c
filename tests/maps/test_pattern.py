"""Patterns against their definitions, and their key ranges against what they allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.maps import Causal, Dilated, Documents, Full, KeyMask, Padding, Sinks, Window
from headwise.maps.ranges import complement, intersect, normalize

from .cases import LENGTHS, draw_pattern

N = 12


def counts(pattern: object) -> list[int]:
    """Keys that each query sees."""
    return pattern.mask(N, N)[0, 0].sum(-1).tolist()  # type: ignore[attr-defined]


def test_windows_count_the_keys_a_query_sees_itself_included() -> None:
    assert counts(Window(1)) == [1] * N
    assert counts(Window(3)) == [1, 2] + [3] * (N - 2)
    assert counts(Causal()) == list(range(1, N + 1))
    assert counts(Window(3, 2))[5] == 5
    assert counts(Window(None, None)) == [N] * N


def test_single_patterns_follow_their_definition() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 0, 0, 3])
    real = torch.rand(N) < 0.5
    rules = [
        (Full(), lambda i, j: True),
        (Causal(), lambda i, j: j <= i),
        (Window(4, 1), lambda i, j: i - 4 < j <= i + 1),
        (Sinks(3), lambda i, j: j < 3),
        (Dilated(3), lambda i, j: (i - j) % 3 == 0),
        (Documents(ids), lambda i, j: ids[i] == ids[j]),
        (Padding(torch.tensor([7])), lambda i, j: j < 7),
        (Padding(torch.tensor([7]), left=True, n=N), lambda i, j: j >= N - 7),
        (KeyMask(real), lambda i, j: bool(real[j])),
        (Causal() & Window(4) | Sinks(2) & Causal(), lambda i, j: j <= i and (i - j < 4 or j < 2)),
        (~Causal(), lambda i, j: j > i),
        (~(Causal() | Sinks(2)), lambda i, j: j > i and j >= 2),
    ]
    for pattern, rule in rules:
        want = torch.tensor([[bool(rule(i, j)) for j in range(N)] for i in range(N)])
        assert torch.equal(pattern.mask(N, N)[0, 0], want), pattern


def test_queries_are_aligned_at_the_end_of_the_keys() -> None:
    whole = Window(5).mask(N, N)[0, 0]
    assert torch.equal(Window(5).mask(3, N)[0, 0], whole[-3:])


def test_two_bands_are_recognised_as_one() -> None:
    assert Causal() & Window(8, 3) == Window(8, 0)
    assert Window(None, 4) & Window(None, 0) == Causal()
    assert Full() & Causal() == Causal()
    assert ~~Causal() == Causal()


@settings(max_examples=300)
@given(st.data())
def test_ranges_bound_what_is_allowed(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    n_k = data.draw(st.sampled_from(LENGTHS))
    n_q = data.draw(st.integers(1, n_k))
    pattern = draw_pattern(data.draw, batch, 2, n_q, n_k, depth=3)
    mask = pattern.mask(n_q, n_k, batch, 2).expand(batch, 2, -1, -1)
    step = data.draw(st.integers(1, n_q))
    for start in range(0, n_q, step):
        rows = mask[:, :, start : start + step]
        offset = n_k - n_q
        seen = pattern.ranges(start + offset, min(start + step, n_q) + offset, n_k)
        inside = torch.zeros(n_k, dtype=torch.bool)
        for low, high in seen.possible:
            inside[low:high] = True
        assert not rows[..., ~inside].any(), (pattern, "allowed outside `possible`")
        for low, high in seen.certain:
            assert rows[..., low:high].all(), (pattern, "forbidden inside `certain`")


def test_band_ranges_are_tight() -> None:
    """Bands lose nothing to the bounds: what is possible is seen by some query of the block."""
    for pattern in (Causal(), Window(9), Window(4, 3), Sinks(3), Causal() & Window(7) | Sinks(2)):
        mask = pattern.mask(64, 64)[0, 0]
        for start in range(0, 64, 16):
            rows = mask[start : start + 16]
            seen = pattern.ranges(start, start + 16, 64)
            assert sum(b - a for a, b in seen.possible) == int(rows.any(0).sum())
            assert sum(b - a for a, b in seen.certain) == int(rows.all(0).sum())


def test_sorted_documents_are_blocks() -> None:
    ids = torch.arange(64) // 16
    assert Documents(ids).ranges(16, 32, 64).certain == ((16, 32),)
    assert Documents(ids).ranges(16, 32, 64).possible == ((16, 32),)


@given(st.lists(st.tuples(st.integers(-3, 20), st.integers(-3, 20))), st.integers(0, 15))
def test_range_algebra(ranges: list[tuple[int, int]], n: int) -> None:
    def members(some: tuple[tuple[int, int], ...]) -> set[int]:
        return {x for a, b in some for x in range(a, b)}

    clean = normalize(ranges, n)
    assert members(clean) == {x for a, b in ranges for x in range(max(a, 0), min(b, n))}
    assert members(complement(clean, n)) == set(range(n)) - members(clean)
    half = normalize([(0, n // 2)], n)
    assert members(intersect(clean, half)) == members(clean) & members(half)


def test_mask_mod_serves_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_mask

    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]])
    pattern = Causal() & Documents(ids)
    made = create_mask(pattern.mask_mod(4, 6), 2, 1, 4, 6, device="cpu")
    assert torch.equal(made, pattern.mask(4, 6, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(-1), "0 or more"),
        (lambda: Dilated(0), "1 or more"),
        (lambda: Padding(torch.tensor([3]), left=True), "give n="),
        (lambda: Documents(torch.rand(4)).mask(4, 4), "integers"),
        (lambda: KeyMask(torch.ones(4)).mask(4, 4), "booleans"),
    ],
)
def test_bad_patterns_say_what_to_give(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
