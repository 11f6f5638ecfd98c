"""What layers add to the residual stream."""

from itertools import pairwise

import pytest
import torch

from headwise.models import observe, view
from tests.models.families import FAMILIES, PRE_NORM, inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_read_once_and_in_order(name):
    model = FAMILIES[name]()
    seen = view(model)
    read = []
    with torch.no_grad(), observe(seen, None, lambda r: read.append((r.layer, r))):
        model(**inputs(model))
    order = [layer for layer, _ in read]
    assert set(order) == set(seen.layers)
    for stack in seen.stacks:
        assert [layer.index for layer in order if layer.stack == stack] == list(
            range(sum(layer.stack == stack for layer in seen.layers))
        )
    for before, after in pairwise(read):
        if before[0].stack == after[0].stack:  # one layer's end is the next one's beginning
            assert torch.equal(before[1].residual_out, after[1].residual_in)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_and_mlp_make_up_the_update(name):
    model = FAMILIES[name]()
    read = []

    def layer(r):
        assert r.attention_out.shape == r.mlp_out.shape == r.residual_in.shape
        update = r.residual_out - r.residual_in
        rest = update - r.attention_out - r.mlp_out
        read.append((rest.abs().max() / update.abs().max()).item())

    with torch.no_grad(), observe(view(model), None, layer):
        model(**inputs(model))
    if name in PRE_NORM:
        assert max(read) < 1e-5
    else:  # the sum is normalised on its way
        assert min(read) > 1e-2
