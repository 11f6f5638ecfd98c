"""Codes come back exactly; numbers within half a scale of what they were."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress.cache.packing import (
    BITS,
    SCALES,
    dequantise,
    pack,
    packed_size,
    quantise,
    ranges,
    unpack,
)

QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_codes_come_back_exactly(bits: int, n: int, seed: int, rows: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    shape = (3, 2, n) if rows else (n,)
    codes = torch.randint(2**bits, shape, generator=made, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_size(n, bits))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_are_those_of_the_bits(bits: int) -> None:
    assert packed_size(64, bits) == 64 * bits // 8
    assert math.ceil(13 * bits / 8) <= packed_size(13, bits) <= math.ceil(16 * bits / 8)


def slow(x: torch.Tensor, bits: int, dim: int, group: int) -> torch.Tensor:
    """Number by number in float64, with ranges that are not rounded."""
    lines = x.double().movedim(dim, -1).contiguous()
    out = lines.clone()
    flat, into = lines.reshape(-1, lines.shape[-1]), out.reshape(-1, lines.shape[-1])
    for row in range(len(flat)):
        for start in range(0, flat.shape[1], group):
            part = flat[row, start : start + group].tolist()
            low, high = min(part), max(part)
            scale = (high - low) / (2**bits - 1)
            for at, value in enumerate(part):
                code = 0 if scale == 0 else round((value - low) / scale)
                into[row, start + at] = low + code * scale
    return out.movedim(-1, dim)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("dim", "group"), [(-1, 5), (1, 4), (0, 2), (2, 100)])
def test_as_the_slow_twin_with_float32_scales(bits: int, dim: int, group: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(3, 9, 10) * torch.logspace(-2, 2, 10)
    got = dequantise(quantise(x, bits, dim, group, torch.float32))
    want = slow(x, bits, dim, group)
    # a number half way between two codes may fall on either side: nearly all agree, none is far
    rounding = 1e-6 * float(x.abs().max())
    assert ((got.double() - want).abs() < rounding).float().mean() > 0.99
    assert (got - x).abs().max() <= (want - x).abs().max() + rounding


@QUICK
@given(
    st.sampled_from(BITS),
    st.sampled_from(SCALES),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    st.sampled_from([0.0, 1.0, -40.0]),
    st.integers(0, 2**31),
)
def test_within_half_a_scale_whatever_type_it_has(
    bits: int, scales: torch.dtype, n: int, group: int, size: float, shift: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(4, n) * size + shift) * torch.tensor([[1.0], [0.1], [3.0], [0.0]])
    packed = quantise(x, bits, 1, group, scales)
    each = packed.scale.float().expand(-1, -1, packed.group).flatten(1)[:, :n]
    rounding = 4e-7 * (abs(shift) * 3 + 5 * size)
    assert ((dequantise(packed) - x).abs() <= each / 2 + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_comes_back(dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, dtype=dtype)
    back = dequantise(quantise(x, 8))
    assert back.dtype == dtype
    assert (back - x).abs().max() < 0.03


def test_equal_numbers_are_exact_where_the_type_holds_them() -> None:
    x = torch.full((2, 8), 0.375)
    assert torch.equal(dequantise(quantise(x, 2)), x)
    odd = torch.full((2, 8), 0.1)
    assert (dequantise(quantise(odd, 2)) - odd).abs().max() < 1e-4


def test_bytes_are_counted() -> None:
    packed = quantise(torch.randn(3, 64, 16), 4, dim=1, group=32)
    assert packed.nbytes() == 3 * 16 * 64 // 2 + 2 * 2 * 3 * 16 * 2
    assert packed.shape == (3, 64, 16)


def test_what_cannot_be_is_refused() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="bits=5"):
        quantise(x, 5)
    with pytest.raises(ValueError, match="group=0"):
        quantise(x, 4, group=0)
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantise(torch.ones(2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantise(x[:0], 4)
    with pytest.raises(ValueError, match="float32"):
        quantise(x * 1e6, 4)
    with pytest.raises(ValueError, match=r"scales=torch\.float64"):
        ranges(x, x, 4, torch.float64)
    with pytest.raises(ValueError, match="3 bytes were given"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 8)
