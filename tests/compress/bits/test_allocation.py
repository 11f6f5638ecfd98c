"""Shared-out bits against every allocation there is."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress.bits.allocation import allocate, cheapest


def best(costs: np.ndarray, losses: np.ndarray, budget: float) -> float:
    """The least loss over all allocations that keep the budget."""
    found = np.inf
    for choice in product(range(costs.shape[1]), repeat=len(costs)):
        price = sum(costs[i, c] for i, c in enumerate(choice))
        if price <= budget + 1e-9:
            found = min(found, sum(losses[i, c] for i, c in enumerate(choice)))
    return found


@settings(max_examples=60, deadline=None)
@given(
    items=st.integers(1, 6),
    options=st.integers(1, 3),
    whole=st.booleans(),
    share=st.floats(0, 1.2),
    seed=st.integers(0, 10**6),
)
def test_the_best_of_all(items: int, options: int, whole: bool, share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = random.integers(1, 9, (items, options)).astype(float)
    losses = random.integers(-3, 9, (items, options)).astype(float)
    if not whole:
        costs, losses = costs * 1e6 * random.random(costs.shape), losses * random.random() * 1e-4
    least, most = cheapest(costs, losses), costs.max(1).sum()
    budget = least + share * (most - least)
    chosen = allocate(costs, losses, budget)
    rows = np.arange(items)
    assert costs[rows, chosen].sum() <= budget * (1 + 1e-6) + 1e-6
    want = best(costs, losses, budget)
    assert losses[rows, chosen].sum() <= want + 1e-6 * max(1e-12, np.abs(losses).max())


def test_ruled_out_options_are_not_taken() -> None:
    losses = [[np.nan, 1.0], [0.0, np.inf]]
    assert allocate([[1, 2], [1, 2]], losses, 3) == (1, 0)
    with pytest.raises(ValueError, match="item 0 has no option"):
        allocate([[1, 2]], [[np.nan, np.inf]], 3)


def test_an_impossible_budget_is_refused_with_the_reachable_one() -> None:
    with pytest.raises(ValueError, match="least that is reachable: 5"):
        allocate([[4, 3], [2, 9]], [[0, 1], [0, 1]], 4)
    with pytest.raises(ValueError, match="two tables"):
        allocate([[1, 2]], [[1], [2]], 4)
    with pytest.raises(ValueError, match="not finite"):
        allocate([[np.inf, 2]], [[1, 2]], 4)


def test_hundreds_of_items() -> None:
    random = np.random.default_rng(0)
    costs = np.repeat(random.integers(1, 99, (200, 1)), 3, 1) * np.array([8, 4, 2])
    losses = random.random((200, 1)) * np.array([0.0, 1, 6])
    budget = 0.5 * costs[:, 0].sum()
    chosen = np.array(allocate(costs, losses, budget))
    rows = np.arange(200)
    assert costs[rows, chosen].sum() <= budget
    uniform = losses[:, 1].sum()
    assert losses[rows, chosen].sum() < 0.8 * uniform  # what 4 bits everywhere would lose
