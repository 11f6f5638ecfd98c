"""A prediction taken apart: it adds up on models as they come, and memory values are as written."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from headwise.instruments.memory_flow import flow
from headwise.models import UnsupportedModelError, observe, view
from headwise.models.backbones import Decoder
from headwise.papers.lens.attention_memory_logit_flow import flow_graph
from headwise.parts import Attention, GroupedQuery, Rotary
from tests.instruments import tiny


def our_own() -> Decoder:
    torch.manual_seed(0)
    mixer = lambda layer: Attention(32, 4, GroupedQuery(2), Rotary(), causal=True)  # noqa: E731
    return Decoder(tiny.VOCABULARY, 32, 3, mixer=mixer, norm=nn.RMSNorm)


def biased() -> Any:
    model = tiny.gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


MODELS: dict[str, Any] = {"llama": tiny.llama, "gpt2": biased, "our own": our_own}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.mark.parametrize("at", [-1, 3, 0])
def test_contributions_and_constant_are_the_logit(model: Any, at: int) -> None:
    ids = tiny.ids(9)
    with torch.no_grad():
        output = model(ids)
    logits = getattr(output, "logits", output)[0, at]
    for target in (None, 7):
        found = flow(model, ids, at, target)
        assert found.target == (int(logits.argmax()) if target is None else target)
        assert found.logit == pytest.approx(float(logits[found.target]))
        total = sum(found.contributions().values()) + found.constant
        assert total == pytest.approx(found.logit, abs=1e-4)


def test_memory_values_against_plain_loops() -> None:
    """A_ij W_O (W_V norm(x_j) + b) of the first layer of a GPT-2, written out."""
    model, ids = biased(), tiny.ids(5)
    maps: list[Any] = []
    with torch.no_grad(), observe(view(model), lambda r: maps.append(r.map.dense()[0])):
        model(ids)
    block = model.transformer.h[0]
    x = model.transformer.wte(ids[0]) + model.transformer.wpe.weight[:5]
    normed = block.ln_1(x).detach().double()
    weight, bias = (p.detach().double() for p in block.attn.c_attn.parameters())
    out = block.attn.c_proj.weight.detach().double()
    found = flow(model, ids, at=3).memory[0]
    assert found.shape == (4, 5, 32)
    for h in range(4):
        rows = slice(64 + 8 * h, 64 + 8 * h + 8)
        for j in range(5):
            value = normed[j] @ weight[:, rows] + bias[rows]
            expected = float(maps[0][h, 3, j]) * value @ out[8 * h : 8 * h + 8]
            torch.testing.assert_close(found[h, j], expected, atol=1e-5, rtol=1e-4)
    assert not found[:, 4].any()  # what comes later is no memory


def test_nothing_is_left_behind(model: Any) -> None:
    ids = tiny.ids(6)
    model.train()
    flow(model, ids)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_graph_is_json(model: Any) -> None:
    graph = json.loads(json.dumps(flow_graph(model, tiny.ids(6), tokenizer=tiny.Words(), top=3)))
    names = {node["id"] for node in graph["nodes"]}
    assert len(names) == len(graph["nodes"])
    assert {e["source"] for e in graph["edges"]} | {e["target"] for e in graph["edges"]} <= names
    assert all(len(n["tokens"]) == (1 if n["kind"] == "prediction" else 3) for n in graph["nodes"])
    assert {n["kind"] for n in graph["nodes"]} == {"prediction", "part", "head", "memory"}


def test_what_is_not_a_plain_sum_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        flow(tiny.bert(), tiny.ids(6))
