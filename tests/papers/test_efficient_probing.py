"""Efficient probing beside the attention it merges, and by hand."""

import pytest
import torch
from torch import nn

from headwise.papers.lens.efficient_probing import efficient_probe, merged


def test_gradients_reach_every_number():
    probe = efficient_probe(12, 3, queries=4, values=8)
    nn.init.normal_(probe.read.weight)
    probe(torch.randn(2, 9, 12)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in probe.parameters())


def test_the_maps_are_those_of_multi_head_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    query, x = torch.randn(12), torch.randn(2, 7, 12)
    _, weights = attention(query.expand(2, 1, 12), x, x, average_attn_weights=False)
    found = merged(attention, query).maps(x)
    assert torch.allclose(found, weights[:, :, 0], atol=1e-6)


def test_patches_that_are_none_are_not_pooled():
    probe = efficient_probe(6, 2, queries=2)
    x, real = torch.randn(1, 5, 6), torch.tensor([[True, True, True, False, False]])
    assert torch.allclose(probe(x, real), probe(x[:, :3]), atol=1e-6)


def test_values_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="do not split"):
        efficient_probe(6, 2, queries=4)
