"""Every policy's scores against plain loops in float64: groups, gaps, padding on either side."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise.compress.cache.policies.accumulated_mass import AccumulatedMass
from headwise.compress.cache.policies.chance import Random
from headwise.compress.cache.policies.key_norm import KeyNorm
from headwise.compress.cache.policies.observation_window import ObservationWindow
from headwise.compress.cache.policies.recency import SinksAndWindow
from headwise.compress.cache.policies.reconstruction_error import ReconstructionError
from headwise.compress.cache.policy import Seen
from tests.compress.cache.policies.seen import rows_seen, weights

SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "rows": st.integers(1, 4),
        "n": st.integers(6, 14),
        "group": st.integers(1, 3),
        "queries": st.integers(1, 4),
        "padded": st.integers(0, 2),
        "gaps": st.booleans(),
        "right": st.booleans(),
    }
)


def same(found: Tensor, want: Tensor, seen: Seen) -> None:
    """Equal where an entry is; finite everywhere."""
    assert found.shape == seen.positions.shape
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[seen.valid].double(), want[seen.valid], atol=2e-5, rtol=2e-4)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_key_norm(shape: dict[str, Any]) -> None:
    seen = rows_seen(**shape)
    want = torch.zeros(seen.positions.shape, dtype=torch.float64)
    for row, keys in enumerate(seen.keys.tolist()):
        for place, key in enumerate(keys):
            want[row, place] = -math.sqrt(sum(x * x for x in key))
    same(KeyNorm().score(seen), want, seen)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.booleans(), st.booleans())
def test_accumulated_mass(shape: dict[str, Any], by_chances: bool, before: bool) -> None:
    seen = rows_seen(**shape, state=before)
    want = weights(seen).sum(2).mean(1)
    if seen.state is not None:
        want = want + seen.state.double()
    policy = AccumulatedMass(by_chances)
    # the cache scores without queries
    later = replace(
        seen,
        state=policy.observe(seen),
        queries=seen.queries[:, :, :0],
        query_positions=seen.query_positions[:, :0],
    )
    if by_chances:
        for row in range(len(want)):
            newest = max(int(at) for at in seen.positions[row])
            for place, at in enumerate(seen.positions[row].tolist()):
                if at >= 0:
                    want[row, place] /= sum(1 for query in range(newest + 1) if query >= at)
    same(policy.score(later), want, seen)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from((1, 3, 5)), st.sampled_from(("average", "max")))
def test_observation_window(shape: dict[str, Any], kernel: int, pool: str) -> None:
    seen = rows_seen(**shape)
    here = weights(seen)
    want = torch.zeros(seen.positions.shape, dtype=torch.float64)
    for row, positions in enumerate(seen.positions.tolist()):
        asked = [at for at in seen.query_positions[row].tolist() if at >= 0]
        if not asked:
            return
        mass = {
            at: float(here[row, :, :, place].sum()) / here.shape[1] / len(asked)
            for place, at in enumerate(positions)
            if 0 <= at < min(asked)
        }
        pooled = {}
        for at in mass:
            near = [mass.get(at + off, 0.0) for off in range(-(kernel // 2), kernel // 2 + 1)]
            pooled[at] = max(near) if pool == "max" else sum(near) / kernel
        for place, at in enumerate(positions):
            want[row, place] = pooled.get(at, max(pooled.values(), default=0.0) + 1)
    same(ObservationWindow(4, kernel, pool).score(seen), want, seen)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_reconstruction_error_is_what_leaving_one_out_costs(shape: dict[str, Any]) -> None:
    """The outputs are computed again, once for every entry, without it."""
    seen = rows_seen(**shape)
    here = weights(seen)
    values = seen.values.double()
    want = torch.zeros(seen.positions.shape, dtype=torch.float64)
    for row in range(here.shape[0]):
        for out in range(here.shape[3]):
            others = [place for place in range(here.shape[3]) if place != out]
            for head in range(here.shape[1]):
                for query in range(here.shape[2]):
                    whole = here[row, head, query] @ values[row]
                    left = here[row, head, query, others]
                    if float(left.sum()) > 0:
                        left = left / left.sum()
                    less = left @ values[row, others]
                    want[row, out] += float((whole - less).square().sum())
    same(ReconstructionError(4).score(seen), want, seen)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_recency_is_the_position(shape: dict[str, Any]) -> None:
    seen = rows_seen(**shape)
    same(SinksAndWindow().score(seen), seen.positions.double(), seen)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(-5, 2**40))
def test_chance_is_splitmix_of_seed_layer_row_place(shape: dict[str, Any], seed: int) -> None:
    """Arithmetic of Python's own integers, modulo 2^64."""
    everything = 2**64 - 1

    def mix(bits: int) -> int:
        bits = (bits + 0x9E3779B97F4A7C15) & everything
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & everything
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & everything
        return bits ^ (bits >> 31)

    seen = rows_seen(**shape)
    want = torch.zeros(seen.positions.shape, dtype=torch.float64)
    for row, positions in enumerate(seen.positions.tolist()):
        for place, at in enumerate(positions):
            start = mix(
                (mix((mix(seed & everything) + seen.layer) & everything) + row) & everything
            )
            want[row, place] = (mix((start + at) & everything) >> 40) / 2**24
    same(Random(seed).score(seen), want, seen)


def test_chance_is_uniform_and_keeps_an_entrys_luck() -> None:
    seen = rows_seen(0, rows=4, n=4000, queries=1)
    score = Random(3).score(seen)
    assert abs(float(score.mean()) - 0.5) < 0.01
    assert abs(float(score.var()) - 1 / 12) < 0.005
    assert len(set(score.flatten().tolist())) > 15_900  # 2^24 values: hardly any twice
    some = torch.arange(0, 4000, 7)
    fewer = replace(seen, positions=seen.positions[:, some])
    assert torch.equal(Random(3).score(fewer), score[:, some])
    assert not torch.equal(Random(4).score(seen), score)


def test_mass_of_chunks_and_tokens_is_the_mass_of_all() -> None:
    """Nothing evicted: the sum over chunks and decoded tokens is that over all queries at once."""
    whole = rows_seen(5, n=12, queries=12, gaps=False)
    policy, state = AccumulatedMass(), None
    for first, end in ((0, 5), (5, 10), (10, 11), (11, 12)):
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
    torch.testing.assert_close(state, policy.observe(whole))


def test_what_is_asked_too_early_is_refused() -> None:
    seen = rows_seen(0, queries=0)
    with pytest.raises(ValueError, match="observe"):
        AccumulatedMass().score(seen)
    for policy in (ObservationWindow(), ReconstructionError()):
        with pytest.raises(ValueError, match="none"):
            policy.score(seen)
    with pytest.raises(ValueError, match="odd kernel"):
        ObservationWindow(kernel=4)
    with pytest.raises(ValueError, match="pool"):
        ObservationWindow(pool="median")
    with pytest.raises(ValueError, match="window"):
        ReconstructionError(0)
