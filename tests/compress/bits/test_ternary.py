"""Weights of two and three values: trained, packed, and the same numbers from a few bits."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headwise.compress.bits.packed import PackBits, PackedBitLinear, pack_bits
from headwise.compress.bits.ternary import BitLinear, BitLinears, few_values, to_bit_linear
from headwise.compress.step import read_step, steps_of, write_step
from tests.instruments import tiny


def by_hand(layer: BitLinear, x: Tensor) -> Tensor:
    """Weight by weight, in float64."""
    weight = layer.weight.detach().double()
    beta, mean = float(weight.abs().mean()), float(weight.mean())
    made = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for row, token in enumerate(x.double()):
        if layer.norm:
            token = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        step = float(token.abs().max()) / 127 or 1.0
        for out, weights in enumerate(weight):
            total = 0.0
            for value, w in zip(token.tolist(), weights.tolist(), strict=True):
                if layer.levels == 2:
                    code = 1 if w > mean else -1
                else:
                    code = max(-1, min(1, round(w / beta)))
                total += round(value / step) * code
            made[row, out] = total * step * beta
        if layer.bias is not None:
            made[row] += layer.bias.detach().double()
    return made


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(2, 19),
    out=st.integers(1, 9),
    levels=st.sampled_from([2, 3]),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_and_packed_form(width: int, out: int, levels: int, norm: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = BitLinear(width, out, levels, bias=True, norm=norm)
    assert layer.bias is not None
    layer.bias.data.normal_()
    x = torch.randn(3, width)
    want = by_hand(layer, x)
    # a number in the middle between two codes may go to either
    step = 2 * float(layer.weight.detach().abs().mean()) * (x.abs().max() + 3) / 127
    assert float((layer(x).detach().double() - want).abs().max()) <= 1e-4 + step
    packed = PackedBitLinear(width, out, levels, True, norm)
    packed.fill(layer)
    torch.testing.assert_close(packed(x), layer(x), atol=1e-4 + step, rtol=1e-4)
    torch.testing.assert_close(packed.weight, layer.effective_weight(), atol=1e-6, rtol=1e-5)


def test_typical_tokens_to_the_last_digit() -> None:
    for levels in (2, 3):
        torch.manual_seed(levels)
        layer = BitLinear(64, 24, levels)
        x = torch.randn(5, 64)
        packed = PackedBitLinear(64, 24, levels)
        packed.fill(layer)
        torch.testing.assert_close(layer(x).double(), by_hand(layer, x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("levels", "per"), [(2, 8), (3, 4)])
def test_bytes_and_values(levels: int, per: int) -> None:
    layer = BitLinear(50, 6, levels)
    assert layer.effective_weight().unique().numel() == levels
    packed = PackedBitLinear(50, 6, levels)
    held = sum(t.nbytes for t in packed.state_dict().values())
    assert held == 6 * -(-50 // per) + 4
    assert few_values(torch.zeros(2, 2), levels)[0].isfinite().all()


@pytest.mark.parametrize("levels", [2, 3])
def test_gradients_pass_straight_through(levels: int) -> None:
    torch.manual_seed(0)
    layer = BitLinear(32, 8, levels, norm=False)
    x = torch.randn(4, 32, requires_grad=True)
    toward = torch.randn(4, 8)
    (layer(x) * toward).sum().backward()
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    tokens = (x.detach() / step).round() * step
    torch.testing.assert_close(layer.weight.grad, toward.T @ tokens)
    torch.testing.assert_close(x.grad, toward @ layer.effective_weight().detach())
    packed = PackedBitLinear(32, 8, levels, norm=False)
    packed.fill(layer)
    again = x.detach().requires_grad_()
    (packed(again) * toward).sum().backward()
    torch.testing.assert_close(again.grad, x.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_are_packed_and_done_again(name: str) -> None:
    make = getattr(tiny, name)
    model = make()
    to_bit_linear(model, levels=3)
    ids = tiny.ids(9, batch=2)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        pack_bits(model)
        assert not any(isinstance(m, BitLinear) for m in model.modules())
        torch.testing.assert_close(model(input_ids=ids).logits, want, atol=2e-3, rtol=1e-3)
    steps = [read_step(write_step(step)) for step in steps_of(model)]
    assert isinstance(steps[0], BitLinears)
    assert isinstance(steps[1], PackBits)
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    for step in steps:
        step.apply(other)
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    empty = make().to("meta")
    for step in steps:
        step.apply(empty)


def test_training_lowers_the_loss() -> None:
    model = tiny.llama()
    to_bit_linear(model, levels=2)
    model.train()
    ids = tiny.ids(24, batch=4)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_what_cannot_be_is_refused() -> None:
    model = tiny.llama()
    with pytest.raises(ValueError, match="no BitLinear"):
        pack_bits(model)
    with pytest.raises(ValueError, match="levels=4"):
        to_bit_linear(model, levels=4)
    with pytest.raises(ValueError, match="expected a BitLinear"):
        PackBits(("lm_head",)).apply(model)
    tied = tiny.llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="shares its weight"):
        to_bit_linear(tied, ["lm_head"])
    assert steps_of(model) == ()
    before = copy.deepcopy(model.state_dict())
    assert before.keys() == model.state_dict().keys()
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
