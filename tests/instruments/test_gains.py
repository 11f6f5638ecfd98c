"""The linear part of norms, found by probing, on norms as models have them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headwise.instruments.gains import Gain, find_gain


def randomised(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def hf(module: str, name: str, *args: Any) -> nn.Module:
    transformers = pytest.importorskip(f"transformers.models.{module}")
    return randomised(getattr(transformers, name)(*args))


class Tanh(nn.Module):
    """A dynamic tanh in place of a norm: no gain describes it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(0.01 * x)


class Conditioned(nn.LayerNorm):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * condition


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


@pytest.mark.parametrize("size", [2, 3, 5, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(size: int, dtype: torch.dtype) -> None:
    norm = randomised(nn.LayerNorm(size)).to(dtype)
    found = find_gain(norm, size)
    assert isinstance(found, Gain)
    assert found.centred
    torch.testing.assert_close(found.gain, norm.weight.double(), atol=1e-6, rtol=1e-6)
    assert found.bias is not None
    assert isinstance(norm.bias, Tensor)
    torch.testing.assert_close(found.bias, norm.bias.double(), atol=1e-6, rtol=1e-6)
    assert norm.weight.dtype == dtype  # left as it was


def test_a_norm_without_a_bias_has_none() -> None:
    for norm in (nn.RMSNorm(6), nn.LayerNorm(6, bias=False), nn.LayerNorm(6)):
        found = find_gain(norm, 6)
        assert isinstance(found, Gain)
        assert found.bias is None


@pytest.mark.parametrize("size", [2, 3, 8])
def test_rms_norms(size: int) -> None:
    llama = hf("llama.modeling_llama", "LlamaRMSNorm", size)
    gemma = hf("gemma2.modeling_gemma2", "Gemma2RMSNorm", size)
    t5 = hf("t5.modeling_t5", "T5LayerNorm", size)
    for norm, offset in ((llama, 0), (gemma, 1), (t5, 0)):
        found = find_gain(norm, size)
        assert isinstance(found, Gain), type(norm)
        assert not found.centred
        expected = norm.weight.double() + offset  # type: ignore[operator]
        torch.testing.assert_close(found.gain, expected, atol=1e-5, rtol=1e-5)


def test_scales_and_nothing() -> None:
    scale = randomised(Scale(6))
    found = find_gain(scale, 6)
    assert isinstance(found, Gain)
    assert not found.centred
    torch.testing.assert_close(found.gain, scale.lambda1.double())  # type: ignore[union-attr]
    nothing = find_gain(None, 4)
    assert isinstance(nothing, Gain)
    assert nothing.gain.tolist() == [1, 1, 1, 1]
    assert not nothing.centred


def test_a_gain_of_zero_is_a_gain() -> None:
    norm = nn.LayerNorm(4)
    nn.init.zeros_(norm.weight)
    found = find_gain(norm, 4)
    assert isinstance(found, Gain)
    assert not found.gain.any()


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (Tanh(), "Tanh is no norm or scaling whose gain"),
        (Conditioned(4), "Conditioned does not map vectors of 4 numbers by themselves"),
        (nn.LayerNorm(5), "LayerNorm does not map vectors of 4 numbers"),
        (nn.Linear(4, 3), "Linear maps 4 numbers to (3,)"),
        (nn.Linear(4, 4), "Linear is no norm or scaling"),
        (nn.ReLU(), "ReLU is no norm or scaling"),
    ],
)
def test_what_is_no_norm(norm: nn.Module, words: str) -> None:
    found = find_gain(randomised(norm), 4)
    assert isinstance(found, str)
    assert words in found


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_folding_equals_running_the_norm(kind: type[nn.Module]) -> None:
    """W norm(x) = (folded W) x / size(x) + what the bias gives; the same for a norm behind."""
    norm = randomised(kind(6)).double()
    found = find_gain(norm, 6)
    assert isinstance(found, Gain)
    x, weight = torch.randn(6).double(), torch.randn(3, 6).double()
    centred = x - x.mean() if kind is nn.LayerNorm else x
    bias = getattr(norm, "bias", None)
    bias = torch.zeros(6).double() if bias is None else bias
    size = centred.pow(2).mean().sqrt()
    expected = weight @ (norm(x) - bias)
    torch.testing.assert_close(found.into_input(weight) @ x / size, expected, atol=1e-4, rtol=1e-4)
    o = torch.randn(3).double()
    wide = weight.T
    y = wide @ o
    size = (y - y.mean() if kind is nn.LayerNorm else y).pow(2).mean().sqrt()
    expected = norm(y) - bias
    torch.testing.assert_close(found.after_output(wide) @ o / size, expected, atol=1e-3, rtol=1e-3)
