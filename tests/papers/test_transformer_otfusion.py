import itertools

import pytest
import torch

from headwise.models.backbones import Decoder
from headwise.papers.compress import transformer_otfusion as paper
from headwise.parts import Attention
from headwise.parts.feed.mlp import Mlp

torch.set_num_threads(1)


def _cost(n, m, seed=0):
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_matchings_against_all_permutations():
    for seed in range(5):
        cost = _cost(6, 6, seed)
        plan = paper.transport(cost)
        best = min(
            sum(float(cost[i, p[i]]) for i in range(6)) for p in itertools.permutations(range(6))
        )
        assert float((plan * cost).sum()) == pytest.approx(best)
        torch.testing.assert_close(plan.sum(0), torch.ones(6, dtype=torch.float64))
        assert set(plan.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("n", "m"), [(6, 6), (12, 6), (4, 6)])
def test_exact_plans_against_pot(n, m):
    ot = pytest.importorskip("ot")
    cost = _cost(n, m)
    want = ot.emd([1 / n] * n, [1 / m] * m, cost.numpy())
    plan = paper.transport(cost) / m
    torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
    assert float((plan * cost).sum()) == pytest.approx(float((want * cost.numpy()).sum()))


def test_soft_plans_against_pot():
    ot = pytest.importorskip("ot")
    cost = _cost(7, 5)
    want = ot.sinkhorn([1 / 7] * 7, [1 / 5] * 5, cost.numpy(), float(0.1 * cost.mean()))
    torch.testing.assert_close(paper.sinkhorn(cost, 0.1), torch.as_tensor(want), atol=1e-6, rtol=0)


def test_a_wide_model_fuses_into_a_narrow_one():
    def make(hidden):
        torch.manual_seed(hidden)
        return Decoder(
            paper.task().vocabulary,
            32,
            2,
            lambda layer: Attention(32, 4, causal=True),
            lambda layer: Mlp(32, hidden),
        ).eval()

    large, small = make(96), make(48)
    for blur in (None, 0.05):
        fused = paper.otfusion(large, small, paper.text(), blur)
        assert [p.shape for p in fused.parameters()] == [p.shape for p in small.parameters()]
        assert all(bool(p.isfinite().all()) for p in fused.parameters())


def test_a_model_whose_neurons_are_all_there_twice_is_the_narrow_one():
    """From 96 neurons that are 48 pairs of equal ones to 48: nothing is lost."""

    def make(hidden):
        torch.manual_seed(0)
        return Decoder(
            paper.task().vocabulary,
            32,
            1,
            lambda layer: Attention(32, 4, causal=True),
            lambda layer: Mlp(32, hidden),
        ).eval()

    small, large = make(48), make(96)
    state = {n: p for n, p in small.state_dict().items() if "feeds" not in n}
    large.load_state_dict(state, strict=False)
    with torch.no_grad():
        new, old = large.stack.feeds[0], small.stack.feeds[0]
        new.up.weight.copy_(torch.cat([old.up.weight] * 2))
        new.up.bias.copy_(torch.cat([old.up.bias] * 2))
        new.down.weight.copy_(torch.cat([old.down.weight] * 2, 1) / 2)
        new.down.bias.copy_(old.down.bias)
        torch.testing.assert_close(large(paper.text()), small(paper.text()), atol=1e-4, rtol=1e-4)
    fused = paper.aligned(large, small, paper.text())
    with torch.no_grad():
        torch.testing.assert_close(fused(paper.text()), small(paper.text()), atol=1e-4, rtol=1e-4)
