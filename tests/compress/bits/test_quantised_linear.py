"""The layer of codes against plain loops in float64, and what it costs in bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.compress.bits.integers import integer_product, packed_product, token_codes
from headwise.compress.bits.quantised_linear import QuantisedLinear
from headwise.compress.bits.rounding import round_to_nearest, rounded
from headwise.compress.cache.packing import pack


def nearest(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """The slow twin: every value that a group can take is tried for every weight."""
    made = weight.double().clone()
    size = group or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            some = weight[row, start : start + size].double()
            if bits == 8:
                scale = float(some.abs().max()) / 127
                values = [scale * code for code in range(-127, 128)]
            else:
                least, largest = min(0.0, float(some.min())), max(0.0, float(some.max()))
                scale = (largest - least) / (2**bits - 1)
                zero = round(-least / scale) if scale else 0
                values = [scale * (code - zero) for code in range(2**bits)]
            grid = torch.tensor(values, dtype=torch.float64)
            for at, one in enumerate(some):
                made[row, start + at] = grid[(grid - one).abs().argmin()]
    return made


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 4),
    groups=st.integers(1, 3),
    size=st.integers(1, 9),
    bits=st.sampled_from([8, 4, 2]),
    seed=st.integers(0, 99),
)
def test_rounding_is_to_the_nearest(out: int, groups: int, size: int, bits: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, groups * size, generator=random)
    for group in (None, size):
        made = rounded(weight, bits, group)
        want = nearest(weight, bits, group)
        off = (weight.double() - want).abs()
        mine = (weight.double() - made.double()).abs()
        # where two values are equally near either will do
        torch.testing.assert_close(mine, off, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group", [None, 8])
def test_no_weight_moves_by_more_than_half_a_scale(bits: int, group: int | None) -> None:
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(bits)) ** 3
    made = round_to_nearest(weight, bits, group)
    half = made.scale.repeat_interleave(48 // made.scale.shape[1], 1) / 2
    assert ((made.weight() - weight).abs() <= half * (1 + 1e-4)).all()
    assert (rounded(torch.zeros(2, 8), bits) == 0).all()
    pruned = weight.clone()
    pruned[:, ::3] = 0
    assert (rounded(pruned, bits, group)[:, ::3] == 0).all()


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 19),
    out=st.integers(1, 18),
    bits=st.sampled_from([4, 2]),
    seed=st.integers(0, 99),
)
def test_integer_products_are_exact(rows: int, width: int, out: int, bits: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, width), generator=random, dtype=torch.int8)
    full = torch.randint(-127, 128, (out, width), generator=random, dtype=torch.int8)
    assert torch.equal(integer_product(x, full).long(), x.long() @ full.long().T)
    codes = torch.randint(0, 2**bits, (out, width), generator=random, dtype=torch.uint8)
    made = packed_product(x, pack(codes, bits), bits)
    assert torch.equal(made.long(), x.long() @ codes.long().T)


def layer(bits: int, group: int | None, activations: str = "float") -> QuantisedLinear:
    random = torch.Generator().manual_seed(3)
    made = QuantisedLinear(48, 21, bits, group, True, activations)
    made.fill(round_to_nearest(torch.randn(21, 48, generator=random), bits, group))
    assert made.bias is not None
    made.bias.data.normal_(generator=random)
    return made


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_a_product_with_the_weight(
    bits: int, group: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwise.compress.bits.quantised_linear._TILE", 200)
    one = layer(bits, group)
    one.bias.data = one.bias.data.to(dtype)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 48, dtype=dtype)
    want = x.double() @ one.weight.double().T + one.bias.double()  # type: ignore[union-attr]
    tolerance = {torch.bfloat16: 0.15, torch.float32: 1e-4, torch.float64: 1e-5}[dtype]
    got = one(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance / 10)
    assert one(x[:0]).shape == (0, 3, 21)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_tokens_in_eight_bits(bits: int) -> None:
    one = layer(bits, None, "int8")
    x = torch.randn(5, 48) * torch.tensor([1.0, 10, 0.1, 0, 1e-4])[:, None]
    codes, scale = token_codes(x)
    assert ((codes * scale - x).abs() <= scale / 2 * (1 + 1e-4)).all()
    want = (codes.double() * scale.double()) @ one.weight.double().T + one.bias.double()  # type: ignore[union-attr]
    torch.testing.assert_close(one(x).double(), want, atol=1e-4, rtol=1e-4)
    assert one(x[:0]).shape == (0, 21)
    # against the unrounded tokens: half a step of each, at most
    exact = x.double() @ one.weight.double().T + one.bias.double()  # type: ignore[union-attr]
    bound = scale / 2 * one.weight.abs().sum(1)
    assert ((one(x) - exact).abs() <= bound * (1 + 1e-3) + 1e-4).all()


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_tokens_get_gradients(activations: str) -> None:
    one = layer(4, None, activations)
    x = torch.randn(2, 3, 48, requires_grad=True)
    toward = torch.randn(2, 3, 21)
    (one(x) * toward).sum().backward()
    torch.testing.assert_close(x.grad, toward @ one.weight.clone(), atol=1e-4, rtol=1e-4)


def test_the_weight_cannot_be_written_into() -> None:
    one = layer(8, None)
    with pytest.raises(RuntimeError, match="inference"):
        one.weight[0] = 0
    assert one.weight.requires_grad is False


@pytest.mark.parametrize(("bits", "codes"), [(8, 48), (4, 24), (3, 18), (2, 12)])
def test_bytes_are_gone(bits: int, codes: int) -> None:
    held = {name: value.nbytes for name, value in layer(bits, None).state_dict().items()}
    want = {"codes": 21 * codes, "scale": 21 * 4, "bias": 21 * 4}
    want |= {} if bits == 8 else {"zero": 21}
    assert held == want


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bits=5"):
        QuantisedLinear(8, 8, 5)
    with pytest.raises(ValueError, match="does not divide"):
        QuantisedLinear(8, 8, 8, group=3)
    with pytest.raises(ValueError, match="one scale"):
        QuantisedLinear(8, 8, 8, group=4, activations="int8")
    with pytest.raises(ValueError, match="integer product"):
        QuantisedLinear(8, 8, 3, activations="int8")
    with pytest.raises(ValueError, match="activations="):
        QuantisedLinear(8, 8, 8, activations="int4")
    with pytest.raises(ValueError, match="do not fit"):
        layer(8, None).fill(round_to_nearest(torch.ones(21, 48), 4))
