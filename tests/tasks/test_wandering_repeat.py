"""Repetition at an unknown distance, counted again in plain Python."""

from __future__ import annotations

import pytest

from headwise.tasks import WanderingRepeat
from headwise.tasks.task import IGNORED


def test_answers_and_facts() -> None:
    task = WanderingRepeat(length=5, slack=6, vocabulary=20)
    batch = task.batch(0, 64)
    befores = set()
    for ids, targets, distance, answer in zip(
        batch.inputs["input_ids"].tolist(),
        batch.targets.tolist(),
        batch.facts["distance"].tolist(),
        batch.facts["answer"].tolist(),
        strict=True,
    ):
        assert len(ids) == 15
        assert len(set(ids[:11])) == 11
        start = ids.index(ids[11])
        befores.add(start)
        for place in range(15):
            told = targets[place]
            if place < 11:
                assert told == IGNORED
            else:
                assert told == ids[start + place - 11 + 1]
                assert ids[place - distance] == told
        assert ids[answer] == targets[-1]
    assert befores == set(range(7))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary >= length"):
        WanderingRepeat(length=8, slack=8, vocabulary=15)
