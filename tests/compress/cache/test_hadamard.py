"""The rotation against scipy's matrix."""

import pytest
import torch
from scipy.linalg import hadamard

from headwise.compress.cache.hadamard import blocks_of, rotate
from headwise.compress.cache.packing import dequantise, quantise


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_as_the_matrix(size: int) -> None:
    torch.manual_seed(size)
    x = torch.randn(2, 3, size, dtype=torch.float64)
    matrix = torch.tensor(hadamard(size), dtype=torch.float64) / size**0.5
    assert torch.allclose(rotate(x), x @ matrix, atol=1e-12)


@pytest.mark.parametrize(("size", "block"), [(96, 32), (80, 16), (7, 1)])
def test_blocks_where_the_size_is_no_power_of_two(size: int, block: int) -> None:
    x = torch.randn(2, size, dtype=torch.float64)
    matrix = torch.block_diag(*[torch.tensor(hadamard(block)).double()] * (size // block))
    assert blocks_of(size) == block
    assert torch.allclose(rotate(x), x @ matrix / block**0.5, atol=1e-12)


@pytest.mark.parametrize("size", [48, 64])
def test_its_own_inverse_and_scores_stay(size: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, size)
    assert torch.allclose(rotate(rotate(q)), q, atol=1e-5)
    assert torch.allclose(rotate(q) @ rotate(k).mT, q @ k.mT, atol=1e-4)


def test_gradients_and_types() -> None:
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x,))
    assert rotate(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="size=0"):
        rotate(torch.randn(2, 0))


def test_outlier_channels_cost_less_after_it() -> None:
    torch.manual_seed(0)
    keys = torch.randn(64, 128)
    keys[:, [3, 40, 77, 101]] *= 20
    plain = (dequantise(quantise(keys, 2)) - keys).norm()
    turned = (rotate(dequantise(quantise(rotate(keys), 2))) - keys).norm()
    assert turned < 0.7 * plain
