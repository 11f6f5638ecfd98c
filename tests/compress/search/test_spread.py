from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress.search.spread import spread


@given(
    rows=st.lists(
        st.lists(st.floats(0, 1, allow_nan=False), min_size=4, max_size=4), min_size=1, max_size=5
    )
)
@settings(deadline=None, max_examples=60)
def test_no_other_choice_within_the_mean_loses_less(rows: list[list[float]]) -> None:
    levels, mean = (0.125, 0.25, 0.5, 1.0), 0.25
    found = spread(levels, rows, mean)
    assert sum(found) / len(found) <= mean * (1 + 1e-9)
    loss = sum(row[levels.index(level)] for row, level in zip(rows, found, strict=True))
    every = [
        sum(row[n] for row, n in zip(rows, choice, strict=True))
        for choice in product(range(4), repeat=len(rows))
        if sum(levels[n] for n in choice) <= mean * len(rows) * (1 + 1e-9)
    ]
    assert loss == pytest.approx(min(every), abs=1e-9)


def test_many_layers_may_all_have_the_mean() -> None:
    assert spread((0.3,), [[0.0]] * 31, 0.3) == [0.3] * 31


def test_a_mean_under_every_level_is_refused() -> None:
    with pytest.raises(ValueError, match="lowest level"):
        spread((0.5, 1.0), [[0.0, 0.0]], 0.25)
