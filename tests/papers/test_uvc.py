import copy

import pytest
import torch

from headwise.compress import cost, steps_of
from headwise.compress.structure.budgeted import Learning, Size, bottom, cut, flops, shrink
from headwise.models import view
from headwise.papers.compress import uvc as paper

torch.set_num_threads(1)


def _state(model):
    return Learning.start(Size.of(view(model), model.tokens))


def test_the_formula_agrees_with_cost():
    for seed in range(3):
        model, removed, gates = paper.drawn(seed)
        size = Size.of(view(model), model.tokens)
        whole = flops(size, torch.zeros(3, 2), torch.ones(3))
        less = float(whole - flops(size, removed, gates))
        tokens = model.tokens
        small = cut(model, removed, gates)
        assert less == cost(model, tokens).flops - cost(small, tokens).flops
        assert {type(s).__name__ for s in steps_of(small)} == {
            "PruneHeads",
            "PruneChannels",
            "DropLayers",
        }
        assert not steps_of(model)


def test_bottom_groups_shrink_and_others_stay():
    model = paper.fresh(0)
    state = _state(model)
    state.shares[0] = torch.tensor([0.3, 0.5])  # 0.9 and 63.5: rounded up
    state.y += 1.0
    before = copy.deepcopy(model)
    left, edge = shrink(view(model), state)
    old, new = before.stack.feeds[0].down.weight.detach(), model.stack.feeds[0].down.weight.detach()
    squares = sorted((float(c.square().sum()), n) for n, c in enumerate(old.T))
    gone = [n for _, n in squares[:64]]
    assert sorted(gone) == bottom(old.T, 64)
    stay = [n for _, n in squares[64:]]
    torch.testing.assert_close(new[:, gone], old[:, gone] / (1 + 2 * 1.001))
    torch.testing.assert_close(new[:, stay], old[:, stay])
    assert float(left[0, 1]) == pytest.approx(float(new[:, gone].square().sum()), rel=1e-5)
    assert float(edge[0, 1]) == pytest.approx(squares[64][0], rel=1e-5)
    assert float(left[1:].sum()) == 0.0


def test_the_price_rises_over_the_budget_and_falls_under_it():
    state = _state(paper.fresh(0))
    assert state.climb(-0.1, 0.4, 15.0) == 0.0
    assert state.climb(0.5, 0.4, 0.0) == pytest.approx(0.2)
    assert state.climb(-0.1, 0.4, 0.0) == pytest.approx(0.16)


def test_slopes_pass_through_the_rounding():
    state = _state(paper.fresh(0))
    state.shares.fill_(0.1).requires_grad_()
    state.logits.requires_grad_()
    removed = state.removed()
    assert removed.tolist() == [[1.0, 13.0]] * 3
    slopes = torch.autograd.grad(state.share(), (state.shares, state.logits))
    assert bool((slopes[0] < 0).all())
    assert bool((slopes[1] > 0).all())


def test_a_gate_that_is_all_closed_leaves_the_likeliest():
    state = _state(paper.fresh(0))
    state.logits = torch.tensor([-3.0, -1.0, -2.0])
    assert state.open().round().tolist() == [0.0, 1.0, 0.0]


def test_the_model_is_left_as_it_was():
    model = paper.fresh(0).eval()
    before = copy.deepcopy(model.state_dict())
    small, state = paper.uvc(model, paper.data(0), 0.5, steps=3, after=2)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert len(state.spent) == 3
    assert paper.work(small) <= paper.work(model)
