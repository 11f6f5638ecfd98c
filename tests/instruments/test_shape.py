"""Entropy, sharpness and distance of whole models against their own eager attention matrices."""

import numpy as np
import pytest

from headwise.instruments.shape import Shape
from tests.instruments import tiny


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert"])
def test_shape_equals_eager(name: str) -> None:
    model = getattr(tiny, name)()
    ids = tiny.ids(70, batch=2)
    results, _ = tiny.measure(model, [Shape()], {"input_ids": ids})
    distance = np.arange(70)[:, None] - np.arange(70)
    for layer, dense in enumerate(tiny.maps(model, {"input_ids": ids})):
        entropy = -(dense * np.log(np.maximum(dense, 1e-300))).sum(-1)
        mean = (dense * distance).sum(-1)
        variance = (dense * (distance - mean[..., None]) ** 2).sum(-1)
        if name == "bert":
            visible = np.full(70, 70)
        elif name == "mistral":
            visible = np.minimum(np.arange(70) + 1, 9)
        else:
            visible = np.arange(70) + 1
        wanted = {
            "entropy": entropy.mean(-1),
            "entropy_share": entropy.sum(-1) / np.log(visible).sum(),
            "effective_keys": np.exp(entropy).mean(-1),
            "max_weight": dense.max(-1).mean(-1),
            "mean_distance": mean.mean(-1),
            "distance_std": np.sqrt(variance).mean(-1),
        }
        assert wanted["entropy_share"].max() < 0.97  # else the bounds below would prove little
        for b, result in enumerate(results):
            for column, values in wanted.items():
                mine = result.heads[column][layer * 4 : layer * 4 + 4]
                assert np.allclose(mine, values[b], rtol=2e-4, atol=2e-4), (column, layer)


def test_cross_attention_has_no_distance() -> None:
    results, _ = tiny.measure(tiny.bart(), [Shape()], tiny.ids(20))
    distance, entropy = results[0].heads["mean_distance"], results[0].heads["entropy"]
    # encoder self (2 layers), then decoder self and cross, layer by layer
    cross = np.zeros(24, dtype=bool)
    cross[12:16] = cross[20:24] = True
    assert np.array_equal(np.isnan(distance), cross)
    assert not np.isnan(entropy).any()
