"""Heads that a score and their effect rank differently, on tables made by hand."""

import numpy as np
import pytest

from headwise.instruments.atlas import Atlas
from headwise.instruments.disagreement import correlational, disagreement


def atlas(score, effect, error=None, **more):
    count = len(score)
    heads = {"layer": np.arange(count), "head": np.zeros(count, int)}
    heads |= {"residual_share": np.array(score, float), "effect": np.array(effect, float)}
    heads |= {name: np.array(values) for name, values in more.items()}
    spread = {} if error is None else {"effect": np.array(error, float)}
    cause = {"cause": {"metric": "loss"}}
    return Atlas(heads=heads, spread=spread, provenance=cause)


EIGHT = [8, 7, 6, 5, 4, 3, 2, 1]


def test_ranks_that_agree_name_nobody():
    found = disagreement(atlas(EIGHT, [0.8, -0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]))
    assert found.correlation == pytest.approx(1)  # by size: what is better without counts too
    assert found.over == found.under == ()


def test_the_head_that_only_looks_and_the_one_that_does():
    effect = [0.01, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.8]
    made = atlas(EIGHT, effect)
    found = disagreement(made)
    assert (found.over, found.under) == ((0,), (7,))
    first, second = found.sentences(made)
    assert first.startswith("L0H0 is number 1 of 8 by residual share, but without it the loss")
    assert "+0.01 only (number 8)" in first
    assert second.startswith("L7H0 is number 8 by residual share, yet")
    assert "+0.8 (number 1)" in second


def test_an_effect_within_its_error_is_no_surprise():
    effect = [0.01, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.8]
    found = disagreement(atlas(EIGHT, effect, [0.01] * 7 + [0.5]))
    assert found.over == (0,)
    assert found.under == ()
    assert disagreement(atlas(EIGHT, effect, [0.01] * 8)).under == (7,)
    assert disagreement(atlas(EIGHT, effect, [np.nan] * 8)).under == (7,)


def test_what_was_not_measured_is_left_out():
    score = [np.nan, *EIGHT]
    found = disagreement(atlas(score, [9, *([0.01, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.8])]))
    assert found.heads == 8
    assert (found.over, found.under) == ((1,), (8,))


def test_columns_that_can_be_set_against_effects():
    made = atlas(EIGHT, EIGHT, entropy=np.ones(8), similar_to=np.arange(8.0), max_weight=EIGHT)
    made.heads["max_weight"] = made.heads["max_weight"].astype(float)
    assert correlational(made) == ["residual_share", "max_weight"]
    with pytest.raises(KeyError, match="no head column 'nothing'"):
        disagreement(made, "nothing")
    bare = Atlas(heads={"layer": np.arange(3), "head": np.arange(3), "effect": np.arange(3.0)})
    assert disagreement(bare) is None
    del bare.heads["effect"]
    with pytest.raises(KeyError, match="no effects"):
        disagreement(bare)
