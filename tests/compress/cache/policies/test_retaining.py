"""Retaining heads: labels in plain loops, scores that know nothing of what comes later, a model
that is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.compress.cache.policies.learned import Learned
from headwise.compress.cache.policies.retaining import (
    RetainingHeads,
    importance,
    train_retaining_heads,
)
from headwise.models import observe, view
from headwise.models.identity import weights_hash
from headwise.models.reading import AttentionReading
from tests.compress.cache.policies.seen import rows_seen
from tests.instruments import tiny


def heads_of(layers: int = 2) -> list[RetainingHeads]:
    torch.manual_seed(0)
    return [RetainingHeads(3, 2, 4, 5, width=16) for _ in range(layers)]


def test_the_label_is_the_largest_score_that_a_later_question_gives() -> None:
    model, ids = tiny.llama(), tiny.ids(9, batch=2)
    asked = torch.zeros(2, 9, dtype=torch.bool)
    asked[0, 4] = asked[0, 7] = asked[1, 6] = True
    seen = []

    def read(r: AttentionReading) -> None:
        seen.append((r.query.clone(), r.key.clone(), *importance(r, asked)))

    with torch.no_grad(), observe(view(model), read):
        model(ids)
    for queries, keys, found, there in seen:
        for sequence in range(2):
            for token in range(9):
                later = [q for q in range(token, 9) if asked[sequence, q]]
                assert bool(there[sequence, token]) == bool(later)
                for kv in range(2):
                    scores = [
                        float(queries[sequence, head, q] @ keys[sequence, kv, token]) * 8**-0.5
                        for q in later
                        for head in (2 * kv, 2 * kv + 1)
                    ]
                    want = max(scores, default=0.0)
                    assert float(found[sequence, kv, token]) == pytest.approx(want, abs=1e-4)


def test_scores_are_those_of_each_token_alone() -> None:
    """In chunks or at once, with or without what comes later: the same to the bit or nearly so."""
    whole, policy = rows_seen(1, n=9, queries=9, gaps=False), Learned(heads_of())
    at_once = policy.observe(whole)
    state = None
    for first, end in ((0, 4), (4, 8), (8, 9)):
        if state is not None:
            state = torch.cat([state, state.new_zeros(3, end - first)], 1)
        state = policy.observe(
            replace(
                whole,
                keys=whole.keys[:, :end],
                values=whole.values[:, :end],
                positions=whole.positions[:, :end],
                queries=whole.queries[:, :, first:end],
                query_positions=whole.query_positions[:, first:end],
                state=state,
            )
        )
    torch.testing.assert_close(state, at_once, atol=1e-6, rtol=1e-5)
    module = heads_of()[1]
    for token in range(9):
        parts = (whole.queries[:, :, token], whole.keys[:, token], whole.values[:, token])
        told = torch.cat([part.flatten() for part in parts])
        hidden = module.inner.weight @ told
        want = module.outer.weight @ (hidden * hidden.sigmoid())
        torch.testing.assert_close(at_once[:, token], want, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_scored_is_refused() -> None:
    seen = rows_seen(1, n=6, queries=6)
    with pytest.raises(ValueError, match="not for 1"):
        Learned(heads_of(1)).observe(seen)
    with pytest.raises(ValueError, match="call it before"):
        Learned(heads_of()).score(seen)
    split = replace(
        seen,
        rows=seen.rows[:2],
        keys=seen.keys[:2],
        values=seen.values[:2],
        positions=seen.positions[:2],
        queries=seen.queries[:2],
        query_positions=seen.query_positions[:2],
    )
    with pytest.raises(ValueError, match="one budget for all heads"):
        Learned(heads_of()).observe(split)
    with pytest.raises(ValueError, match="something is asked"):
        train_retaining_heads(tiny.llama(), [])


def test_training_lowers_the_loss_and_leaves_the_model_alone() -> None:
    model = tiny.llama()
    before = weights_hash(model)
    asked = torch.zeros(4, 24, dtype=torch.bool)
    asked[:, -4:] = True
    steps = [({"input_ids": tiny.ids(24, seed % 5, 4)}, asked) for seed in range(60)]
    with torch.no_grad():  # as a caller may have it
        heads, losses = train_retaining_heads(model, steps, width=32, rate=1e-2)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert [h.kv_heads for h in heads] == [2, 2]
    assert weights_hash(model) == before
    assert all(p.grad is None for p in model.parameters())
    again, _ = train_retaining_heads(model, steps[:2], width=32)
    twice, _ = train_retaining_heads(model, steps[:2], width=32)
    for one, other in zip(again, twice, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict())
