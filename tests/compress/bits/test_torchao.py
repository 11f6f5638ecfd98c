"""The same rounding as torchao's, which is another implementation of it."""

import logging

import pytest
import torch
from torch import nn

from headwise.compress.bits.quantised_linear import QuantisedLinear
from headwise.compress.bits.rounding import round_to_nearest


def test_eight_bits_a_row() -> None:
    for talking in ("torchao", "torch.utils._pytree"):
        logging.getLogger(talking).setLevel(logging.ERROR)
    ao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 32))
    weight, bias = linear[0].weight.detach().clone(), linear[0].bias
    ours = QuantisedLinear(64, 32, 8)
    ours.fill(round_to_nearest(weight, 8))
    assert ours.bias is not None
    ours.bias.data.copy_(bias)
    x = torch.randn(7, 64)
    with torch.no_grad():
        ao.quantize_(linear, ao.Int8WeightOnlyConfig())
        theirs = linear[0].weight.dequantize()
        step = weight.abs().amax(1, keepdim=True) / 127
        # their range ends at 127.5 steps; both are within half a step of the weight
        assert ((ours.weight - theirs).abs() <= 1.05 * step).all()
        assert float((ours.weight - weight).norm()) <= 1.02 * float((theirs - weight).norm())
        torch.testing.assert_close(ours(x), linear(x), atol=0.02, rtol=0.02)
