"""What is done to a model whose layers share maps: done right, or refused before anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from headwise.compress import (
    LowRank,
    QuantisedLinear,
    drop_layers,
    factorise,
    load,
    prune_heads,
    quantise,
    reorder_layers,
    route_attention,
    save,
    share_attention,
    steps_of,
)
from headwise.models import UnsupportedModelError
from headwise.models.projections import features_first
from tests.compress.structure.test_shared_maps import MODELS, SOURCES, ids


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids(), use_cache=False).logits
    return found


@pytest.mark.parametrize("how", ["factorise", "quantise"])
@pytest.mark.parametrize("name", MODELS)
def test_matrices_that_are_shared_can_be_replaced(name: str, how: str, tmp_path: Any) -> None:
    model = MODELS[name]()
    share_attention(model, SOURCES)
    twin = copy.deepcopy(model)
    if how == "factorise":
        factorise(model, rank=4, weighting="none")
    else:
        quantise(model, 8)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, LowRank | QuantisedLinear):
                features_first(twin.get_submodule(path)).copy_(module.weight)
    assert torch.allclose(logits(model), logits(twin), atol=2e-4)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids(), **settings)
    assert torch.equal(cached, model.generate(ids(), **settings, use_cache=False))
    save(model, tmp_path / "small")
    assert torch.equal(logits(load(tmp_path / "small")), logits(model))


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "heads": lambda m: prune_heads(m, [(1, 0)]),
    "heads of the other": lambda m: prune_heads(m, [(2, 0), (2, 1)]),
    "layer": lambda m: drop_layers(m, [1]),
    "attention": lambda m: drop_layers(m, [1], parts="attention"),
    "order": lambda m: reorder_layers(m, [0, 2, 1, 3]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_would_leave_a_layer_without_a_map_is_refused(name: str, change: str) -> None:
    model = MODELS[name]()
    share_attention(model, SOURCES)
    before, steps = logits(model), steps_of(model)
    with pytest.raises(UnsupportedModelError, match=r"share maps|cannot be cut"):
        CHANGES[change](model)
    assert torch.equal(logits(model), before)
    assert steps_of(model) == steps


def test_layers_go_with_those_that_share_their_map() -> None:
    model = MODELS["llama"]()
    share_attention(model, SOURCES)
    drop_layers(model, [1, 2, 3])
    assert logits(model).isfinite().all()


def test_routers_are_no_matrices_of_a_layer() -> None:
    model = MODELS["llama"]()
    route_attention(model)
    quantise(model, 8)
    factorise(MODELS["llama"](), rank=4, weighting="none")
    routers = [m for n, m in model.named_modules() if n.endswith("router.linear")]
    assert len(routers) == 4
    assert all(type(router) is nn.Linear for router in routers)
