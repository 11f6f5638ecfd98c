"""The tensor of a bilinear layer against the sum that defines it, entry by entry."""

from __future__ import annotations

import pytest
import torch

from headwise.papers.lens.bilinear_mlp import (
    bilinear,
    one_layer,
    pair_terms,
    quadratic_form,
    tensor,
)


@pytest.mark.parametrize("bias", [False, True])
def test_entries_are_the_sum_that_defines_them(bias: bool) -> None:
    torch.manual_seed(0)
    layer = bilinear(4, 5, bias=bias).double()
    gate, up, down = layer.gate.weight, layer.up.weight, layer.down.weight
    if bias:
        gate = torch.cat([gate, layer.gate.bias[:, None]], 1)
        up = torch.cat([up, layer.up.bias[:, None]], 1)
    found, size = tensor(layer), gate.shape[1]
    assert found.shape == (4, size, size)
    for a in range(4):
        for j in range(size):
            for k in range(size):
                one = sum(down[a, i] * gate[i, j] * up[i, k] for i in range(5))
                other = sum(down[a, i] * gate[i, k] * up[i, j] for i in range(5))
                expected = (one + other) / 2
                if bias and j == k == size - 1:
                    expected = expected + layer.down.bias[a]
                assert float(found[a, j, k]) == pytest.approx(float(expected))
    torch.testing.assert_close(quadratic_form(layer, torch.ones(4)), found.sum(0))


def test_gradients_reach_the_weights() -> None:
    layer = bilinear(4)
    torch.linalg.eigvalsh(quadratic_form(layer, torch.ones(4)))[-1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_every_pair_of_paths_is_needed() -> None:
    model = one_layer(bilinear, 0)
    ids = torch.randint(20, (1, 6))
    found, expected = pair_terms(model, ids)
    assert found.shape == (6, 24)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
