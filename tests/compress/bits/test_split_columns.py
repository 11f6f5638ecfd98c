"""Columns that are trained beside columns that are not."""

import pytest
import torch
from torch import nn

from headwise.compress.structure.split_columns import Split


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_same_product_and_gradient(bias: bool, k: int) -> None:
    torch.manual_seed(k)
    linear = nn.Linear(12, 7, bias=bias)
    split = Split(linear, k)
    x = torch.randn(2, 3, 12, requires_grad=True)
    y = x.detach().requires_grad_()
    toward = torch.randn(2, 3, 7)
    (split(x) * toward).sum().backward()
    (linear(y) * toward).sum().backward()
    torch.testing.assert_close(split(x), linear(y))
    torch.testing.assert_close(x.grad, y.grad)
    assert linear.weight.grad is not None
    torch.testing.assert_close(split.trained.grad, linear.weight.grad[:, :k])
    assert [name for name, _ in split.named_parameters()] == ["trained"]


def test_adapters_come_off_and_go_on() -> None:
    split = Split(nn.Linear(6, 4), 2)
    base = split.weight.detach().clone()
    with torch.no_grad():
        split.trained += 1
    adapter = split.adapter()
    tuned = split.weight.detach().clone()
    split.put(None)
    assert torch.equal(split.weight, base)
    split.put(adapter)
    torch.testing.assert_close(split.weight, tuned)
    assert torch.linalg.matrix_rank(tuned - base) <= 2
