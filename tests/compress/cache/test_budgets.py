"""How much each row keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress import Adaptive, ByKind, HeadCache, PerHead, Pyramid, Uniform
from headwise.compress.cache.budgets import Budget, Shape, as_budget
from headwise.instruments.atlas import Atlas
from tests.compress.cache.models import MODELS, logits
from tests.instruments import tiny

SHAPE = Shape((4, 4), (2, 2))


def atlas(kinds: list[list[str]]) -> Atlas:
    rows = [(layer, head, kind) for layer, row in enumerate(kinds) for head, kind in enumerate(row)]
    names = ("layer", "head", "kind")
    return Atlas({name: np.array([row[at] for row in rows]) for at, name in enumerate(names)})


def test_shares_and_numbers() -> None:
    assert Uniform(0.25).keep(0, 101, []) == [26]  # never less than was asked for
    assert Uniform(0.1).keep(0, 30, []) == [3]  # and not more for the sake of rounding errors
    assert Uniform(1.0).keep(0, 7, []) == [7]
    assert Uniform(1).keep(0, 7, []) == [1]
    assert PerHead([[3, 0.5], [1.0, 2]]).fitted(SHAPE).keep(1, 10, []) == [10, 2]
    table = torch.tensor([[3, 4], [5, 6]])
    assert as_budget(table).keep(1, 10, []) == [5, 6]
    assert as_budget(table / 10).keep(0, 100, []) == [30, 40]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(10, 500), st.floats(1, 30))
def test_a_pyramid_falls_and_has_its_mean(layers: int, amount: int, beta: float) -> None:
    budget = Pyramid(amount, beta).fitted(Shape((4,) * layers, (2,) * layers))
    kept = [budget.keep(layer, 10_000, [])[0] for layer in range(layers)]
    assert kept == sorted(kept, reverse=True)
    assert abs(sum(kept) / layers - amount) <= 1
    if layers > 1:
        assert abs(kept[-1] - amount / beta) <= 1


def test_kinds() -> None:
    kinds = [
        ["sink", "local", "retrieval", "sink"],
        ["mixed", "local", "previous-token", "positional"],
    ]
    fitted = ByKind(atlas(kinds), window=7, rest=0.5).fitted(SHAPE)
    assert fitted.table == ((7, 1.0), (0.5, 7))
    with pytest.raises(ValueError, match="nothing of 4 of the model's 8 heads, head 0 of layer 1"):
        ByKind(atlas(kinds[:1])).fitted(SHAPE)
    with pytest.raises(ValueError, match="no kinds"):
        ByKind(Atlas({"layer": np.array([0]), "head": np.array([0])}))
    model = MODELS["llama"]()
    budget = ByKind(atlas([["sink"] * 2 + ["induction"] * 2] * 2), window=8)
    with HeadCache(model, budget, sinks=2, window=4, step=4, slack=4) as cache:
        logits(model, cache, tiny.ids(60), [60])
        assert [len(places) for places in cache.kept(0)] == [8, 60]


def test_an_adaptive_budget_goes_where_the_scores_are() -> None:
    scores = [torch.arange(10.0), torch.arange(10.0) + 100]
    assert Adaptive(4, floor=0.0).fitted(SHAPE).keep(0, 10, scores) == [0, 8]
    assert Adaptive(4, floor=0.5).fitted(SHAPE).keep(0, 10, scores) == [2, 6]
    assert Adaptive(4, floor=1.0).fitted(SHAPE).keep(0, 10, scores) == [4, 4]
    assert Adaptive(0.4, floor=0.0).fitted(SHAPE).keep(0, 10, scores) == [0, 8]
    layered = Adaptive(Pyramid(4, beta=2), floor=0.0).fitted(SHAPE)
    assert [sum(layered.keep(layer, 10, scores)) for layer in (0, 1)] == [12, 4]
    kept_always = [torch.full((4,), torch.inf), torch.full((4,), torch.inf)]
    assert sum(Adaptive(3).fitted(SHAPE).keep(0, 10, kept_always)) == 6


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: Uniform(0.0), "above 0 and at most 1.0"),
        (lambda: Uniform(1.2), "above 0 and at most 1.0"),
        (lambda: Uniform(0), "at least 1"),
        (lambda: Pyramid(0.5, beta=0.5), "beta >= 1"),
        (lambda: Adaptive(0.5, floor=2), "floor"),
        (lambda: PerHead([[1, 2], [3, 0]]), "head 1 of layer 1"),
        (lambda: PerHead([[1, 2]]).fitted(SHAPE), "2 layers of 2, the table 1 layers of 2"),
        (lambda: PerHead([[1, 2], [1]]).fitted(SHAPE), r"the table layers of \[2, 1\]"),
        (lambda: Pyramid(4, layers=3).fitted(SHAPE), "3 layers, not for 2"),
    ],
)
def test_what_cannot_be_is_refused(made: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        made()


def test_the_wrong_thing_is_refused() -> None:
    with pytest.raises(TypeError, match="share of the tokens"):
        Uniform(True)
    with pytest.raises(TypeError, match="share of the tokens"):
        as_budget("all")  # type: ignore[arg-type]

    class Short(Budget):
        def keep(self, layer: int, length: int, scores: Any) -> list[int]:
            return [1, 2, 3]

    model = MODELS["llama"]()
    with HeadCache(model, Short()) as cache, pytest.raises(ValueError, match="gave 3 numbers"):
        logits(model, cache, tiny.ids(9), [9])
