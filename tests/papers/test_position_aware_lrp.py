"""PA-LRP on models of transformers: what the catalog's own small model does not show."""

from __future__ import annotations

import pytest
import torch

from headwise.instruments.metrics import LogitDifference
from headwise.instruments.relevance_propagation import pa_lrp, propagate
from headwise.models import UnsupportedModelError, view
from headwise.papers.lens.position_aware_lrp import batch, position_aware_lrp, without_biases
from headwise.parts import Alibi, Rotary
from tests.instruments import tiny


def test_an_image_is_pairs_too() -> None:
    model = tiny.vit().double()
    pixels = {"pixel_values": torch.randn(3, 3, 32, 32).double()}
    found = position_aware_lrp(model, pixels, torch.tensor([0, 1, 1]), maps="constant")
    torch.testing.assert_close(found.lost, torch.zeros(3).double(), atol=1e-8, rtol=0)
    assert found.positions is not None
    assert found.positions.shape == (3, 17)


def test_an_example_is_explained_alone() -> None:
    """Angles and tables are shared by a batch; their relevance is each example's own."""
    for model in (tiny.llama(), tiny.gpt2()):
        ids = tiny.ids(8, batch=3)
        metric = LogitDifference(4, 5)
        whole = propagate(view(model), {"input_ids": ids}, metric, positions=True)
        assert whole.positions is not None
        for row in range(3):
            one = propagate(view(model), {"input_ids": ids[row : row + 1]}, metric, positions=True)
            assert one.positions is not None
            torch.testing.assert_close(one.tokens[0], whole.tokens[row], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(one.positions[0], whole.positions[row], atol=1e-4, rtol=1e-3)


def test_gradients_of_the_model_stay_its_own() -> None:
    model, asked = without_biases(0, Rotary()), batch(4)
    before = torch.autograd.grad(model(**asked.inputs).sum(), model.embed.weight)[0]
    position_aware_lrp(model, asked.inputs, asked.targets)
    after = torch.autograd.grad(model(**asked.inputs).sum(), model.embed.weight)[0]
    assert torch.equal(before, after)
    assert not any("wheel" in vars(m) or "embed" in vars(m) for m in model.modules())
    assert model.stack.mixers[0].backend is None


def test_biases_by_distance_are_refused() -> None:
    model = without_biases(0, Alibi())
    with pytest.raises(UnsupportedModelError, match="no positional encoding of Encoder"):
        pa_lrp(view(model), batch(2).inputs, LogitDifference(0, 1))
