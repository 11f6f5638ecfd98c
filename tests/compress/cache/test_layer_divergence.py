"""Prices of bits in predictions, against transformers' cache with rounded entries put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from headwise.compress import Coding, cache_divergence
from tests.instruments import tiny


@torch.no_grad()
def test_as_entries_rounded_by_hand() -> None:
    net: Any = tiny.llama()
    ids = torch.randint(1, tiny.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
    coding = Coding(group=8, residual=4, scales=torch.float32)
    pairs = ((2, 8), (8, 2), (8, 8))
    found = cache_divergence(net, ids, pairs, coding)
    before = net(ids).logits[:, 36:].double().log_softmax(-1)
    for layer in range(2):
        for n, (bk, bv) in enumerate(pairs):
            cache: Any = DynamicCache(config=net.config)
            net(ids[:, :36], past_key_values=cache)
            held = cache.layers[layer]
            keys, values = held.keys.clone(), held.values.clone()
            for start in range(0, 32, 8):  # 36 tokens less 4, in groups
                part = keys[:, :, start : start + 8]
                low, high = part.amin(2, True), part.amax(2, True)
                scale = (high - low) / (2**bk - 1)
                keys[:, :, start : start + 8] = low + ((part - low) / scale).round() * scale
            part = values[:, :, :32]
            low, high = part.amin(3, True), part.amax(3, True)
            scale = (high - low) / (2**bv - 1)
            values[:, :, :32] = low + ((part - low) / scale).round() * scale
            held.keys, held.values = keys, values
            after = net(ids[:, 36:], past_key_values=cache).logits.double().log_softmax(-1)
            want = float((before.exp() * (before - after)).sum(-1).mean())
            assert found.errors[layer, n] == pytest.approx(want, rel=0.05, abs=1e-5)
    assert found.errors[:, 2].max() < found.errors[:, :2].min()
    assert found.allot(5.0).mean == 5.0


def test_short_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="none is coded before 64"):
        cache_divergence(tiny.llama(), torch.randint(1, 50, (1, 60)))
