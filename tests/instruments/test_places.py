"""Mass near the query against eager matrices."""

import numpy as np
import pytest

from headwise.instruments.places import Places
from tests.instruments import tiny

N = 90


@pytest.mark.parametrize("name", ["llama", "bert", "mistral"])
def test_places_equal_eager(name: str) -> None:
    model = getattr(tiny, name)()
    ids = tiny.ids(N)
    (result,), _ = tiny.measure(model, [Places()], ids)
    distance = np.arange(N)[:, None] - np.arange(N)
    for layer, dense in enumerate(tiny.maps(model, {"input_ids": ids})):
        p = dense[0]
        bands = np.stack(
            [np.pad(np.diagonal(p, -d, 1, 2), ((0, 0), _pad(d))) for d in range(-7, 8)]
        )
        profile = bands.mean(-1, keepdims=True)
        wanted = {
            "self_mass": (p * (distance == 0)).sum((1, 2)) / N,
            "previous_mass": (p * (distance == 1)).sum((1, 2)) / N,
            "next_mass": (p * (distance == -1)).sum((1, 2)) / N,
            "local_8": (p * (np.abs(distance) < 8)).sum((1, 2)) / N,
            "local_64": (p * (np.abs(distance) < 64)).sum((1, 2)) / N,
            "positional": np.minimum(bands, profile).sum(0).mean(-1),
        }
        for column, values in wanted.items():
            mine = result.heads[column][layer * 4 : layer * 4 + 4]
            assert np.allclose(mine, values, atol=1e-5), column
        assert (wanted["next_mass"] > 0).all() == (name == "bert")


def _pad(offset: int) -> tuple[int, int]:
    """A diagonal at i - j = offset has rows offset, offset + 1, ...; below zero it ends early."""
    return (offset, 0) if offset >= 0 else (0, -offset)


def test_cross_attention_has_no_places() -> None:
    (result,), _ = tiny.measure(tiny.bart(), [Places()], tiny.ids(20))
    assert np.isnan(result.heads["self_mass"]).sum() == 8
