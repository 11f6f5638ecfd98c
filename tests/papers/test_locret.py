"""Locret's cache on a model with several layers and groups."""

from __future__ import annotations

import torch

from headwise.compress import RetainingHeads
from headwise.papers.cache.locret import locret_cache
from tests.instruments import tiny


@torch.no_grad()
def test_scores_decide_but_for_the_newest() -> None:
    model, ids = tiny.llama(), tiny.ids(60, batch=2)
    torch.manual_seed(0)
    heads = [RetainingHeads(2, 2, 8, 8, width=16) for _ in range(2)]
    with locret_cache(model, heads, budget=20, stabilizers=6) as cache:
        for start in range(0, 60, 15):
            model(ids[:, start : start + 15], past_key_values=cache)
        kept = cache.kept(1)
    assert all(len(row) == 20 and row[-6:] == list(range(54, 60)) for row in kept)
    assert kept[0] != kept[1]


@torch.no_grad()
def test_room_for_all_changes_nothing() -> None:
    model, ids = tiny.llama(), tiny.ids(30)
    heads = [RetainingHeads(2, 2, 8, 8, width=16) for _ in range(2)]
    want = model(ids).logits
    with locret_cache(model, heads, budget=30, stabilizers=4) as cache:
        found = [model(ids[:, at : at + 10], past_key_values=cache).logits for at in (0, 10, 20)]
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-4, rtol=1e-4)
