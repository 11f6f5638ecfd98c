"""Every policy at work in a HeadCache: chunks, decoding, groups, padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headwise.compress.cache.budgets import Adaptive
from headwise.compress.cache.head_cache import HeadCache
from headwise.compress.cache.policies.accumulated_mass import AccumulatedMass
from headwise.compress.cache.policies.chance import Random
from headwise.compress.cache.policies.key_norm import KeyNorm
from headwise.compress.cache.policies.learned import Learned
from headwise.compress.cache.policies.observation_window import ObservationWindow
from headwise.compress.cache.policies.recency import SinksAndWindow
from headwise.compress.cache.policies.reconstruction_error import ReconstructionError
from headwise.compress.cache.policies.retaining import RetainingHeads
from headwise.compress.cache.policy import Policy, Seen
from headwise.models import observe, view
from tests.instruments import tiny


def learned() -> Learned:
    torch.manual_seed(0)
    return Learned([RetainingHeads(2, 2, 8, 8, width=16) for _ in range(2)])


POLICIES: dict[str, Callable[[], Policy]] = {
    "key norm": KeyNorm,
    "mass": AccumulatedMass,
    "mass by chances": lambda: AccumulatedMass(by_chances=True),
    "observation": lambda: ObservationWindow(8, 3),
    "observation, max": lambda: ObservationWindow(8, 3, "max"),
    "recency": SinksAndWindow,
    "reconstruction": lambda: ReconstructionError(8),
    "chance": Random,
    "learned": learned,
}
BUDGET, CHUNK = 24, 20


def cache_of(model: object, policy: Policy, **more: object) -> HeadCache:
    given = {"budget": BUDGET, "sinks": 2, "window": 8, "step": 1, "slack": 4, **more}
    return HeadCache(model, policy=policy, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_chunks_never_hold_more_than_budget_and_chunk(name: str) -> None:
    model, ids = tiny.llama(), tiny.ids(100, batch=2)
    policy = POLICIES[name]()
    held, score = [], policy.score

    def seeing(seen: Seen) -> Tensor:
        held.append(seen.positions.shape[1])
        return score(seen)

    policy.score = seeing  # type: ignore[method-assign]
    cache = cache_of(model, policy)
    for start in range(0, 80, CHUNK):
        model(ids[:, start : start + CHUNK], past_key_values=cache)
        assert max(len(row) for layer in (0, 1) for row in cache.kept(layer)) <= BUDGET
    assert max(held) == BUDGET + CHUNK
    for at in range(80, 100):
        model(ids[:, at : at + 1], past_key_values=cache)
        longest = max(len(row) for layer in (0, 1) for row in cache.kept(layer))
        assert longest <= BUDGET + 4
    for layer in (0, 1):
        for row in cache.kept(layer):
            assert row[:2] == [0, 1]
            assert row[-8:] == list(range(92, 100))


# chance goes by row and place; a maximum is that of several neighbours: which is cut is not said
@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("chance", "observation, max")])
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    """A sequence keeps what it would keep alone, shifted by the padding in front of it."""
    model = tiny.llama()
    ids = torch.randperm(56, generator=torch.Generator().manual_seed(0))[None] + 3  # none twice
    alone = cache_of(model, POLICIES[name]())
    model(ids, past_key_values=alone)
    mask = torch.ones(2, 61, dtype=torch.long)
    mask[1, :5] = 0
    both = torch.cat([tiny.ids(61, 7), torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)])
    together = cache_of(model, POLICIES[name]())
    places = (mask.cumsum(1) - 1).clamp_min(0)
    model(both, attention_mask=mask, position_ids=places, past_key_values=together)
    for layer in (0, 1):
        for head in range(2):
            shifted = [at + 5 for at in alone.kept(layer)[head]]
            assert together.kept(layer)[2 + head] == shifted


@torch.no_grad()
def test_the_smallest_keys_are_what_is_kept() -> None:
    model, ids = tiny.llama(), tiny.ids(60)
    cache = cache_of(model, KeyNorm(), sinks=0, window=1)
    model(ids, past_key_values=cache)
    norms = []
    with observe(view(model), lambda r: norms.append(r.key[0].norm(dim=-1))):
        model(ids)
    for layer, of_heads in enumerate(norms):
        for head, norm in enumerate(of_heads):
            best = set(norm[:-1].argsort()[: BUDGET - 1].tolist()) | {59}
            assert set(cache.kept(layer)[head]) == best


@torch.no_grad()
def test_a_shared_budget_goes_by_score() -> None:
    model, ids = tiny.llama(), tiny.ids(60)
    for policy in (KeyNorm(), ObservationWindow(8, 3), AccumulatedMass()):
        cache = cache_of(model, policy, budget=Adaptive(BUDGET, floor=0.0))
        model(ids, past_key_values=cache)
        counts = [len(row) for row in cache.kept(0)]
        assert sum(counts) == 2 * BUDGET
        assert len(set(counts)) == 2
