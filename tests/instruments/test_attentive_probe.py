"""What attentive probes compute, by loops, and that they find what one position holds."""

import math

import pytest
import torch

from headwise.instruments.attentive_probe import AttentiveProbe, fit_attentive


@torch.no_grad()
def test_what_it_pools_by_loops():
    torch.manual_seed(0)
    probe = AttentiveProbe(6, 3, queries=2, values=4)
    x = torch.randn(2, 5, 6)
    real = torch.tensor([[True] * 5, [True, True, False, True, False]])
    found = probe.pool(x, real)
    for b in range(2):
        there = [j for j in range(5) if real[b, j]]
        for m in range(2):
            raw = [math.exp(float(x[b, j] @ probe.queries[m]) / math.sqrt(6)) for j in there]
            for i in range(2):
                values = [float(x[b, j] @ probe.values.weight[2 * m + i]) for j in there]
                expected = sum(w * v for w, v in zip(raw, values, strict=True)) / sum(raw)
                assert found[b, 2 * m + i] == pytest.approx(expected, abs=1e-5)
    assert probe.maps(x, real)[1, :, [2, 4]].abs().max() == 0


def test_it_finds_the_one_position_that_knows():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(600, 16, 8, generator=random)
    y = torch.randint(2, (600,), generator=random)
    at = torch.randint(16, (600,), generator=random)
    x[range(600), at, 0] = 6.0  # says: here
    x[range(600), at, 1] = 4.0 * y - 2
    probe = fit_attentive(x[:400], y[:400], 2)
    with torch.no_grad():
        assert (probe(x[400:]).argmax(1) == y[400:]).float().mean() > 0.95
        assert (probe.maps(x[400:])[:, 0].argmax(1) == at[400:]).float().mean() > 0.85


def test_the_seed_is_all_that_is_random():
    x, y = torch.randn(20, 4, 6), torch.arange(20) % 2
    state = torch.get_rng_state()
    a, b, c = (fit_attentive(x, y, 2, steps=3, size=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.queries, b.queries)
    assert not torch.equal(a.queries, c.queries)


def test_widths_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="do not split"):
        AttentiveProbe(6, 2, queries=4)
