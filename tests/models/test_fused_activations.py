"""One kernel instead of eight operations: the same numbers, and nothing left behind."""

import pytest
import torch
from transformers.activations import FastGELUActivation, NewGELUActivation

from headwise.models.fused_activations import fused_activations


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_the_same_numbers_and_gradients(kind):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), kind(), torch.nn.GELU())
    x = torch.linspace(-12, 12, 3000).view(-1, 3).requires_grad_()
    known = model(x)
    slope = torch.autograd.grad(known.sum(), x)[0]
    with fused_activations(model):
        assert "forward" in vars(model[1])
        found = model(x)
        assert (found - known).abs().max() < 1e-6 * known.abs().max()
        assert torch.allclose(torch.autograd.grad(found.sum(), x)[0], slope, atol=1e-5)
    assert "forward" not in vars(model[1])


def test_left_as_it_was_after_an_error_and_where_somebody_stands_in():
    model = torch.nn.Sequential(NewGELUActivation(), NewGELUActivation())
    mine = torch.relu
    model[0].forward = mine
    with fused_activations(model):
        assert model[0].forward is mine
    with pytest.raises(RuntimeError), fused_activations(model):
        raise RuntimeError
    assert model[0].forward is mine
    assert "forward" not in vars(model[1])
