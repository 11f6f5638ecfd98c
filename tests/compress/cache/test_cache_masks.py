"""No mask is ever made dense for a cache, and nobody else may read its keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import headwise
from headwise.compress import HeadCache
from headwise.compress.cache.policies.recency import SinksAndWindow
from headwise.maps import Window
from headwise.models import observe, view
from headwise.models.cached import CachedKeys
from headwise.models.errors import UnsupportedModelError
from headwise.models.masks import PatternMask
from tests.compress.cache.models import MODELS, logits
from tests.instruments import tiny

SMALL: dict[str, Any] = {"sinks": 2, "window": 4, "step": 4, "slack": 4}


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("left", [True, False, None])
def test_masks_stay_patterns(name: str, left: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(self: PatternMask) -> Tensor:
        raise AssertionError("a mask was made dense")

    made: list[Tensor | None] = []
    theirs = PatternMask.theirs

    def recorded(self: PatternMask) -> Tensor | None:
        made.append(theirs(self))
        return made[-1]

    monkeypatch.setattr(PatternMask, "dense", dense)
    monkeypatch.setattr(PatternMask, "theirs", recorded)
    mask = torch.ones(2, 60).long()
    if left is not None:
        mask[1, :9] = 0
        if not left:
            mask[1] = mask[1].flip(0)
    ids = tiny.ids(60, batch=2)
    with HeadCache(MODELS[name](), 0.5, SinksAndWindow(), **SMALL) as cache:
        logits(MODELS[name](), cache, ids, [20, 33, 1, 5, 1], attention_mask=mask)
    assert all(mask is None for mask in made)


def test_it_cannot_be_observed_or_edited() -> None:
    model = tiny.llama()
    ids = tiny.ids(9)
    cache = HeadCache(model, 0.5, SinksAndWindow(), **SMALL)
    watched = observe(view(model), read=lambda reading: None)
    with watched, pytest.raises(ValueError, match="cannot be observed or edited"):
        logits(model, cache, ids, [9])
    cache.reset()
    seen: list[str] = []
    with observe(view(model), read=lambda reading: seen.append(reading.attention.name)):
        model(ids)  # without the cache
    assert len(seen) == 2
    logits(model, cache, ids, [9])
    with headwise.swap(model, {(0, 1): Window(3)}), pytest.raises(ValueError, match="edited"):
        logits(model, cache, ids, [1])
    cache.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8), 1)
    with pytest.raises(RuntimeError, match="interrupted"):
        cache.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8), 1)
    cache.reset()
    assert logits(model, cache, ids, [9]).shape == (1, 9, tiny.VOCABULARY)


def test_keys_of_a_cache_are_for_its_attention() -> None:
    class Nobody:
        def attend(self, *given: Any) -> Tensor:
            raise AssertionError

    keys = CachedKeys.of(torch.randn(1, 2, 3, 4), Nobody())
    assert keys.shape == (1, 2, 3, 4)
    assert keys.dtype == torch.float32
    assert keys.size(2) == 3
    for use in (lambda: keys + 1, lambda: keys.mT, lambda: keys[0], lambda: torch.cat([keys])):
        with pytest.raises(UnsupportedModelError, match="HeadCache"):
            use()
