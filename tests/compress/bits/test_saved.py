"""Models of few bits through `save` and `load`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from headwise.compress.bits.packed import pack_bits
from headwise.compress.bits.ternary import to_bit_linear
from headwise.compress.bits.thresholds import threshold_activations
from headwise.compress.bits.weights import quantise
from headwise.compress.saving import load, save
from tests.instruments import tiny


def ternary(model: nn.Module) -> None:
    to_bit_linear(model, "mlp")
    pack_bits(model)


def few_bits(model: nn.Module) -> None:
    threshold_activations(model, {"input_ids": tiny.ids(30)}, 0.5, layers=[1])
    quantise(model, {"model.layers.0": 4, "model.layers.1.self_attn": 8}, group=8)


@pytest.mark.parametrize("change", [ternary, few_bits])
def test_the_same_answers_after_loading(
    change: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = tiny.llama()
    change(model)
    ids = tiny.ids(12, batch=2)
    save(model, tmp_path / "small")
    again = load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    small = sum(f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors"))
    plain = sum(p.nbytes for p in tiny.llama().parameters())
    assert small < 0.8 * plain
