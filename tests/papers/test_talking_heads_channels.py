"""Channels: zeroing in the activations is zeroing in the weights, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch

from headwise.instruments.qk_ov import ov
from headwise.models import view
from headwise.models.backbones import Decoder
from headwise.papers.lens.talking_heads_channels import channels
from headwise.parts import Attention, GroupedQuery


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    made = Decoder(
        20, 32, 2, mixer=lambda layer: Attention(32, 4, project=GroupedQuery(2), causal=True)
    )
    return made.double().eval()


def test_zeroing_a_channel_is_zeroing_its_component_in_the_weights(model: Decoder) -> None:
    ids = torch.randint(20, (2, 9))
    channel = channels(model, (0, 3))[5]
    plain = model(ids)
    with channel.scaled(model, 0.0):
        found = model(ids)
    assert torch.equal(model(ids), plain)
    assert (found - plain).abs().max() > 1e-6
    # the slow twin: W_O loses what it writes along u, which takes s u v^T out of W_O W_V
    weight = view(model).attentions[0].output_weight()
    u = channel.direction
    with torch.no_grad():
        weight[3] -= torch.outer(u, u @ weight[3])
    torch.testing.assert_close(model(ids), found)
    s = ov(model, 0, 3).singular_values()
    assert len(s[s > 1e-9]) == 7  # one of eight is gone


def test_scaling_by_one_changes_nothing_and_gradients_pass(model: Decoder) -> None:
    ids = torch.randint(20, (1, 5))
    channel = channels(model, (0, 1), ("v",))[0]
    plain = model(ids)
    with channel.scaled(model, 1.0):
        torch.testing.assert_close(model(ids), plain)
    with channel.scaled(model, 2.0):
        model(ids).sum().backward()
    assert view(model).attentions[0].value_weight().shape == (2, 8, 32)
    assert all(p.grad is not None for p in model.parameters())


def test_channels_are_all_pairs_in_order(model: Decoder) -> None:
    found = channels(model, (0, 0))
    assert len(found) == 3 * 4 * 8  # kinds, readers, components
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    assert {c.reader[0] for c in found} == {1}
