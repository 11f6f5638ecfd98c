"""The index in plain loops; budgets that add up; a cache with room for all is exact."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.maps import AttentionMap
from headwise.papers.cache.scale_kv import (
    ScaleCache,
    is_drafter,
    scale_budgets,
    selectivity,
    spread,
)


def test_the_index_is_its_formula() -> None:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 4, generator=random) for n in (3, 7))
    current = best = 0.0
    for head in range(2):
        for query in range(3):
            scores = [math.exp(float(q[0, head, query] @ k[0, head, key]) / 2) for key in range(7)]
            weights = [score / sum(scores) for score in scores]
            current += sum(weights[4:]) / 6
            best += sum(sorted(weights[:4])[-2:]) / 6
    assert float(selectivity(AttentionMap(q, k), 4, top=2)) == pytest.approx(current * best, 1e-5)


def test_budgets_add_up_to_an_even_split_or_a_little_less() -> None:
    index = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
    room = scale_budgets(index, drafters=12, uniform=40)
    drafts = is_drafter(index, 12)
    assert int(drafts.sum()) == 12
    for scale in range(5):
        total, count = int(room[:, scale].sum()), int(drafts[:, scale].sum())
        assert 7 * 40 - count < total <= 7 * 40
        if 0 < count < 7:
            assert int(room[drafts[:, scale], scale].min()) > 40
    refiners = [int(room[~drafts[:, s], s][0]) for s in range(5) if 0 < int(drafts[:, s].sum()) < 7]
    assert refiners == sorted(refiners, reverse=True)


def test_room_for_all_changes_nothing_and_less_keeps_the_window() -> None:
    random = torch.Generator().manual_seed(0)
    none = torch.zeros(2, 0, 4)
    full, less = ScaleCache(none, none), ScaleCache(none, none)
    for side in (1, 2, 4):
        q, k, v = (torch.randn(2, side * side, 4, generator=random) for _ in range(3))
        want = full.draw(q, k, v)
        torch.testing.assert_close(less.draw(q, k, v), want)
        less.cut(q, side, 100)
    last = less.keys[:, -16:].clone()
    less.cut(q, 4, 8)
    assert less.keys.shape == less.values.shape == (2, 8, 4)
    for place in spread(4, 4).tolist():
        assert any(torch.equal(last[:, place], less.keys[:, at]) for at in range(8))
    assert spread(4, 4).tolist() == [5, 7, 13, 15]
