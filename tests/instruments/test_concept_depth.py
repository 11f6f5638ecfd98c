"""Jump and converging points against their definitions, letter by letter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.instruments.concept_depth import converging_point, first_layer_at, jump_point

scores = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=12)


@given(scores)
def test_they_are_what_the_definitions_say(alpha):
    d = len(alpha) - 1
    jumps = [i / d for i in range(1, d + 1) if alpha[i] / alpha[i - 1] >= 1.1]
    flats = [i / d for i in range(1, d + 1) if abs(alpha[i] / alpha[i - 1] - 1) < 0.03]
    assert jump_point(alpha) == (min(jumps) if jumps else None)
    assert converging_point(alpha) == (max(flats) if flats else None)


def test_the_first_layer_near_the_best():
    alpha = [0.5, 0.5, 0.8, 0.96, 0.99, 0.97]
    assert first_layer_at(alpha) == 4
    assert first_layer_at(alpha, share=0.9) == 3
    assert first_layer_at(alpha, share=0.9, chance=0.5) == 3
    assert first_layer_at(alpha, share=0.6, chance=0.5) == 2
    assert first_layer_at([0.4], 1.0) == 0


def test_what_are_no_scores_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        jump_point([0.5, 0.0])
    with pytest.raises(ValueError, match="share"):
        first_layer_at([0.5], share=2)
