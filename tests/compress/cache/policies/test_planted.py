"""Four entries are planted among forty: each policy finds the one that it is for, and no other
policy does."""

from __future__ import annotations

import pytest
import torch

from headwise.compress.cache.policies.accumulated_mass import AccumulatedMass
from headwise.compress.cache.policies.chance import Random
from headwise.compress.cache.policies.key_norm import KeyNorm
from headwise.compress.cache.policies.observation_window import ObservationWindow
from headwise.compress.cache.policies.recency import SinksAndWindow
from headwise.compress.cache.policies.reconstruction_error import ReconstructionError
from headwise.compress.cache.policy import Policy, Seen

ENTRIES, RECENT = 40, 4
SMALL, ONCE, NOW, RARE = 5, 9, 14, 20
"""The smallest key; what earlier queries looked at; what the newest look at, with a value like all
others'; what the newest look at a little, with a value like no other's."""


def planted() -> Seen:
    random = torch.Generator().manual_seed(0)
    keys = torch.zeros(1, ENTRIES, 8)
    keys[..., 0] = 3 + torch.rand(1, ENTRIES, generator=random) / 10  # norm, seen by no query
    keys[0, SMALL, 0] = 0.5
    keys[0, ONCE, 1] = keys[0, NOW, 2] = keys[0, RARE, 3] = 1.0
    keys[0, :, 4] = torch.where(keys[0, :, 1:4].sum(-1) > 0, 0.0, 1.0)
    keys[0, SMALL, 4] = 0.0
    queries = torch.zeros(1, 2, ENTRIES, 8)
    queries[..., ONCE + 1 : -RECENT, 1] = 6.0
    for axis, looks in ((2, 6.5), (3, 4.0), (4, 4.5)):
        queries[..., -RECENT:, axis] = looks
    values = torch.ones(1, ENTRIES, 4) + torch.randn(1, ENTRIES, 4, generator=random) / 100
    values[0, RARE] = torch.tensor([-9.0, 9.0, -9.0, 9.0])
    positions = torch.arange(ENTRIES)[None]
    return Seen(0, torch.tensor([0]), keys, values, positions, queries, positions, 1.0)


def order(policy: Policy, seen: Seen) -> list[int]:
    """Entries before the newest few, best first."""
    needs = policy.needs_queries
    asked = seen.queries[:, :, ENTRIES - needs :] if needs is not None else seen.queries
    at = seen.query_positions[:, ENTRIES - needs :] if needs is not None else seen.query_positions
    given = (seen.layer, seen.rows, seen.keys, seen.values, seen.positions, asked, at, seen.scale)
    now = Seen(*given, state=policy.observe(Seen(*given)))
    best: list[int] = policy.score(now)[0, : ENTRIES - RECENT].argsort(descending=True).tolist()
    return best


@pytest.mark.parametrize(
    ("policy", "first"),
    [
        (KeyNorm(), SMALL),
        (AccumulatedMass(), ONCE),
        (ObservationWindow(RECENT, kernel=1), NOW),
        (ReconstructionError(RECENT), RARE),
        (SinksAndWindow(), ENTRIES - RECENT - 1),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Policy) else str(given),
)
def test_each_finds_its_own(policy: Policy, first: int) -> None:
    best = order(policy, planted())
    assert best[0] == first
    assert len({SMALL, ONCE, NOW, RARE} & {best[0]}) == (first < ENTRIES - RECENT - 1)


def test_neighbours_come_along_with_what_is_looked_at() -> None:
    """That is what pooling is for: an answer stands beside the words that are looked at."""
    alone = order(ObservationWindow(RECENT, kernel=1), planted())
    average = order(ObservationWindow(RECENT, kernel=5), planted())
    best = order(ObservationWindow(RECENT, kernel=5, pool="max"), planted())
    near = set(range(NOW - 2, NOW + 3))
    assert set(average[:5]) == near == set(best[:5])
    assert len(set(alone[:5]) & near) < 5


def test_early_entries_have_an_advantage_that_chances_take_away() -> None:
    """Even attention: the sum falls with the position, the mean over chances does not favour the
    first entries as much."""
    seen = planted()
    even = Seen(
        0, seen.rows, torch.zeros_like(seen.keys), seen.values, seen.positions, seen.queries,
        seen.positions, 1.0,
    )  # fmt: skip
    for by_chances in (False, True):
        policy = AccumulatedMass(by_chances)
        state = policy.observe(even)
        score = policy.score(
            Seen(0, even.rows, even.keys, even.values, even.positions, even.queries[:, :, :0],
                 even.positions[:, :0], 1.0, state)
        )[0]  # fmt: skip
        share = float(score[0] / score[ENTRIES // 2])
        assert share == pytest.approx(_even(0, by_chances) / _even(ENTRIES // 2, by_chances))
        assert (share > 4) is not by_chances


def _even(entry: int, by_chances: bool) -> float:
    mass = sum(1 / (query + 1) for query in range(entry, ENTRIES))
    return mass / (ENTRIES - entry) if by_chances else mass


def test_chance_finds_nothing() -> None:
    found = {order(Random(seed), planted())[0] for seed in range(40)}
    assert len(found) > 15
