"""LLM-Microscope's text, who may look at whom in it, and the adapter."""

from __future__ import annotations

import torch

from headwise.maps.masks import Predicate
from headwise.papers.lens.llm_microscope import (
    LENGTH,
    PATTERNS,
    SEPARATOR,
    TEXT,
    Adapter,
    Segments,
)


def test_text_asks_for_a_segment() -> None:
    asked = Segments().batch(0, 50)
    ids, targets = asked.inputs["input_ids"], asked.targets
    assert bool((ids[:, list(Segments.separators)] == SEPARATOR).all())
    assert ids.shape == targets.shape
    for row in range(50):
        segment = int(ids[row, TEXT]) - SEPARATOR - 1
        start = segment * (LENGTH + 1)
        assert targets[row, TEXT:].tolist() == ids[row, start : start + LENGTH].tolist()
        assert ids[row, TEXT + 1 :].tolist() == targets[row, TEXT:-1].tolist()


def test_segments_see_each_other_through_separators_alone() -> None:
    pattern = PATTERNS["separators"]()
    assert isinstance(pattern, Predicate)
    n = TEXT + LENGTH
    mask = pattern.mask(n, n)[0, 0]
    for i in range(n):
        for j in range(i + 1):
            separator = j in Segments.separators
            same = j // (LENGTH + 1) == i // (LENGTH + 1) if i < TEXT else j >= TEXT
            assert bool(mask[i, j]) is (same or separator)


def test_adapter_pools_layers_and_passes_gradients() -> None:
    adapter = Adapter(3, 8, 2, 5)
    states = torch.randn(4, 6, 3, 8)
    found = adapter(states)
    assert found.shape == (4, 6, 2, 5)
    found.sum().backward()
    assert adapter.weights.grad is not None
    adapter.weights.data = torch.tensor([0.0, 60.0, 0.0])  # one layer alone
    other = states.clone()
    other[:, :, 0] += 1
    torch.testing.assert_close(adapter(other), adapter(states))
