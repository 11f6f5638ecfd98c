"""Sinks against the received mass of eager matrices, and maps made so that the answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.instruments.batch import Batch
from headwise.instruments.reading import FEWEST_ROWS, Reading
from headwise.instruments.sinks import Sinks
from headwise.maps import AttentionMap, Causal
from headwise.models import AttentionReading, view
from tests.instruments import tiny

N = 300


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_sinks_equal_eager(name: str) -> None:
    model = getattr(tiny, name)()
    ids = tiny.ids(80)
    (result,), _ = tiny.measure(model, [Sinks()], ids)
    for layer, dense in enumerate(tiny.maps(model, {"input_ids": ids})):
        received = dense[0].sum(1)
        mask = np.tri(80) if name != "bert" else np.ones((80, 80))
        if name == "mistral":
            mask = mask * (np.arange(80)[:, None] - np.arange(80) < 9)
        seen_by = mask.sum(0)
        found = (received / seen_by > 0.3) & (seen_by >= 20)
        share = received / received.sum(-1, keepdims=True)
        mine = {key: v[layer * 4 : layer * 4 + 4] for key, v in result.heads.items()}
        assert np.allclose(mine["sink_mass"], received[:, 0] / 80, atol=1e-5)
        assert np.allclose(mine["found_sink_mass"], (received * found).sum(-1) / 80, atol=1e-5)
        assert np.allclose(mine["received_concentration"], (share**2).sum(-1), atol=1e-5)
        found[:, 0] = True
        dormant = (received * found).sum(-1) / 80 > 0.5
        assert np.array_equal(mine["dormant_share"], dormant)
    assert np.isnan(result.heads["learned_sink_mass"]).all()


def read(sink_at: int, strength: float, sinks: Tensor | None = None) -> dict[str, Any]:
    """What the instrument says of two causal heads, of which the first is drawn to one key."""
    q = torch.ones((1, 2, N, 1))
    k = torch.zeros((1, 2, N, 1))
    k[0, 0, sink_at] = strength
    of = AttentionMap(q, k, Causal(), scale=1.0, sinks=sinks)
    attention = view(tiny.llama()).attentions[0]
    seen = AttentionReading(attention, q, k, k, q, of, None)
    reading = Reading(seen, Batch("text", ("made",), {}, ("",)))
    return {key: value[0].tolist() for key, value in Sinks().read(reading).items()}


def test_a_sink_in_the_middle_is_found_and_is_not_the_first_token() -> None:
    found = read(sink_at=100, strength=12.0)
    assert found["found_sink_mass"][0] == pytest.approx(200 / 300, abs=0.02)
    assert found["sink_mass"][0] == pytest.approx((np.log(100) + 0.6) / 300, abs=0.01)
    assert found["dormant_share"] == [1, 0]
    # an even head has no sink: its early keys weigh much in few rows only
    assert found["found_sink_mass"][1] == 0
    assert found["received_concentration"][0] > 20 * found["received_concentration"][1]


def test_a_key_that_few_rows_see_is_no_sink() -> None:
    assert read(sink_at=N - FEWEST_ROWS + 1, strength=12.0)["found_sink_mass"][0] == 0
    assert read(sink_at=N - FEWEST_ROWS, strength=12.0)["found_sink_mass"][0] > 0.1


def test_a_learned_sink_counts_as_found() -> None:
    # against 300 keys of logit 0 at most, a learned logit of 8 takes nearly all
    found = read(sink_at=0, strength=0.0, sinks=torch.tensor([8.0, -20.0]))
    share = np.mean([np.exp(8) / (np.exp(8) + i + 1) for i in range(N)])
    assert found["learned_sink_mass"] == pytest.approx([share, 0], abs=1e-4)
    assert found["found_sink_mass"] == pytest.approx([share, 0], abs=1e-4)
    assert found["dormant_share"] == [1, 0]


def test_learned_sinks_of_a_model() -> None:
    model = tiny.gpt_oss()
    ids = tiny.ids(60)
    (result,), _ = tiny.measure(model, [Sinks()], ids)
    for layer, dense in enumerate(tiny.maps(model, {"input_ids": ids})):
        missing = 1 - dense[0, :, :, :60].sum(-1).mean(-1)
        mine = result.heads["learned_sink_mass"][layer * 4 : layer * 4 + 4]
        assert np.allclose(mine, missing, atol=1e-4)
        assert mine.max() > 0.001
