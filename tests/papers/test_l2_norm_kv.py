"""The loss beyond the ideal in plain loops, and which layers keep all."""

from __future__ import annotations

import torch

from headwise.papers.cache.l2_norm_kv import attention_loss_gap, norm_cache
from tests.instruments import tiny


def test_the_gap_is_zero_for_the_ideal_order_and_never_negative() -> None:
    random = torch.Generator().manual_seed(0)
    attention = torch.rand(5, 9, generator=random)
    ideal = attention.argsort(-1)
    torch.testing.assert_close(attention_loss_gap(attention, ideal), torch.zeros(5))
    for _ in range(20):
        order = torch.rand(5, 9, generator=random).argsort(-1)
        gap = attention_loss_gap(attention, order)
        assert bool((gap >= -1e-6).all())
        for row in range(5):
            want = 0.0
            for dropped in range(1, 10):
                lost = sum(float(attention[row, key]) for key in order[row, :dropped])
                least = sum(sorted(attention[row].tolist())[:dropped])
                want += lost - least
            assert abs(float(gap[row]) - want) < 1e-4


@torch.no_grad()
def test_a_cache_that_keeps_all_computes_what_no_cache_would() -> None:
    model, ids = tiny.llama(num_hidden_layers=3), tiny.ids(40, batch=2)
    want = model(ids).logits
    with norm_cache(model, keep=1.0) as cache:
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, want)
    with norm_cache(model, keep=0.25) as cache:
        model(ids, past_key_values=cache)
        assert [len(cache.kept(layer)[0]) for layer in range(3)] == [40, 40, 10]
