"""Rounding against every choice there is, and errors against direct norms."""

from itertools import product

import pytest
import torch

from headwise.compress.bits.descent import descend, quadratic_error
from headwise.compress.bits.rounding import Rounded, round_to_nearest


def error(rounded: Rounded, weight: torch.Tensor, x: torch.Tensor, k: torch.Tensor | None) -> float:
    delta = rounded.weight(torch.float64) - weight
    out = x @ delta.T
    return float((out if k is None else out @ k.T).square().sum())


@pytest.mark.parametrize("coupled", [False, True])
def test_quadratic_error_is_a_norm(coupled: bool) -> None:
    x, delta = torch.randn(9, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    k = torch.randn(7, 4, dtype=torch.float64) if coupled else None
    got = quadratic_error(delta, x.T @ x, None if k is None else k.T @ k)
    out = x @ delta.T if k is None else x @ delta.T @ k.T
    torch.testing.assert_close(got, out.square().sum())


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_single_move_is_better(coupled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    x += 0.3 * torch.randn(30, 6, dtype=torch.float64)
    weight = torch.randn(3, 6, dtype=torch.float64)
    k = torch.randn(8, 3, dtype=torch.float64) if coupled else None
    start = round_to_nearest(weight, 2)
    made = descend(start, weight, x.T @ x, None if k is None else k.T @ k)
    found = error(made, weight, x, k)
    assert found <= error(start, weight, x, k) + 1e-9
    assert made.codes.max() <= 3
    for row, column, move in product(range(3), range(6), (-1, 1)):
        codes = made.codes.clone().int()
        codes[row, column] += move
        if 0 <= int(codes[row, column]) <= 3:
            other = Rounded(codes.to(torch.uint8), made.scale, made.zero, 2)
            assert error(other, weight, x, k) >= found - 1e-9


def test_eight_bits_and_groups() -> None:
    weight, x = torch.randn(4, 8), torch.randn(20, 8)
    made = descend(round_to_nearest(weight, 8), weight, x.T @ x)
    assert made.codes.dtype == torch.int8
    with pytest.raises(ValueError, match="one scale a row"):
        descend(round_to_nearest(weight, 4, 4), weight, x.T @ x)
