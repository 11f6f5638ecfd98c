"""What SmolLM2's weights say without running it, beside what its heads are known to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.instruments import composition, token_matching
from headwise.instruments.head_vocabulary import written
from tests.proof.test_smollm2 import model, tokenizer, weights

__all__ = ["model", "tokenizer", "weights"]  # fixtures

INDUCTION = {(17, 3), (17, 4), (18, 6)}
PREVIOUS = (16, 0)


@pytest.fixture(scope="module")
def scores(model: Any) -> Any:
    return composition(model, ("k",), dtype=torch.float32)


def test_k_composition_names_the_induction_heads(scores: Any) -> None:
    """Of 35,235 pairs, the previous-token head with the three induction heads is in the first 12;
    half of all pairs are about as close as random ones."""
    best = {(pair.writer, pair.reader) for pair in scores.top(12, "k")}
    assert {(PREVIOUS, reader) for reader in INDUCTION} <= best
    assert scores.top(1)[0].score > 3 * scores.random
    known = sorted(pair.score for pair in scores.top(10**6))
    assert len(known) == 35_235
    assert known[len(known) // 2] == pytest.approx(scores.random, rel=0.1)


def test_token_matching_names_them_too(model: Any) -> None:
    found = token_matching(model, dtype=torch.float32)
    best = {(match.writer, match.reader) for match in found[:20]}
    assert {(PREVIOUS, reader) for reader in INDUCTION} <= best
    assert abs(found[len(found) // 2].logits) < 0.5  # of the first one's 89


def test_a_head_that_copies_pronouns(model: Any, tokenizer: Any) -> None:
    for direction, word in zip(
        written(model, 26, 2, tokenizer), ("their", "his", "her"), strict=True
    ):
        for words in (direction.reads, direction.writes):
            assert f" {word}" in words.texts
