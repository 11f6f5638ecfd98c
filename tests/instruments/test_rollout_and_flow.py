"""Rollout and flow against whole matrices, sums over all paths, and networkx."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.instruments import attribute, flow, rollout
from headwise.instruments.targets import LogitOf
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.parts import Attention
from tests.instruments import tiny

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Callable[[], Any], dict[str, Tensor], int]] = {
    "bert": (tiny.bert, {"input_ids": tiny.ids(9, batch=2)}, -1),
    "vit": (tiny.vit, {"pixel_values": PIXELS}, 0),
    "llama": (tiny.llama, {"input_ids": tiny.ids(9, batch=2)}, -1),
    "mistral": (lambda: tiny.mistral(4), {"input_ids": tiny.ids(9, batch=2)}, -1),
}


def layers(model: Any, inputs: dict[str, Tensor], which: str = "attentions") -> list[Tensor]:
    return [torch.from_numpy(one) for one in tiny.maps(model, inputs, which)]


def dense(maps: list[Tensor], residual: float = 0.5) -> Tensor:
    own = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    whole = own.repeat(len(maps[0]), 1, 1)
    for one in maps:
        whole = (residual * own + (1 - residual) * one) @ whole
    return whole


@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
@pytest.mark.parametrize("residual", [0.5, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_rollout_is_a_row_of_the_product_of_all_layers(
    name: str, residual: float, fuse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, inputs, place = CASES[name]
    fused = []
    for one in layers(make(), inputs):
        both = {"mean": one.mean(1), "max": one.amax(1), "min": one.amin(1)}[fuse]
        fused.append(both / both.sum(-1, keepdim=True))
    right = dense(fused, residual)[:, place]
    for tile in (2**22, 150):
        monkeypatch.setattr(rollout, "TILE", tile)
        found = attribute(make(), inputs, method="rollout", fuse=fuse, residual=residual)
        assert torch.allclose(torch.tensor(found.scores).double(), right, atol=1e-5)
        assert found.scores.sum(-1) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_rollout_is_the_sum_over_all_paths() -> None:
    torch.manual_seed(0)
    model = Decoder(20, 8, 3, mixer=lambda layer: Attention(8, 2, causal=True)).eval()
    ids = torch.randint(0, 20, (1, 4))
    kept, row = rollout.keep(view(model), {"input_ids": ids}, LogitOf(2))
    maps = [0.5 * one.map.dense()[0].mean(0).double() + 0.5 * torch.eye(4) for one in kept]
    paths = [0.0] * 4
    for third, second, first in product(range(4), repeat=3):
        paths[first] += float(maps[2][3, third] * maps[1][third, second] * maps[0][second, first])
    found = attribute(model, ids, 2, method="rollout").scores[0]
    assert found == pytest.approx(paths, abs=1e-6)
    assert row.tolist() == [[0, 0, 0, 1]]


def bart_inputs() -> dict[str, Tensor]:
    return {"input_ids": tiny.ids(8, batch=2), "decoder_input_ids": tiny.ids(5, 1, batch=2)}


def bart_rows(residual: float) -> tuple[Tensor, Tensor]:
    """What the decoder's last position holds of the encoder's inputs and of its own."""
    model, inputs = tiny.bart(), bart_inputs()
    whole = dense([one.mean(1) for one in layers(model, inputs, "encoder_attentions")], residual)
    own = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    theirs = torch.zeros(2, 5, 8, dtype=torch.float64)
    names = ("decoder_attentions", "cross_attentions")
    for mine, cross in zip(*(layers(model, inputs, name) for name in names), strict=True):
        mixed = residual * torch.eye(5, dtype=torch.float64) + (1 - residual) * mine.mean(1)
        own, theirs = mixed @ own, mixed @ theirs
        theirs = residual * theirs + (1 - residual) * cross.mean(1) @ whole
        own = residual * own
    return theirs[:, -1], own[:, -1]


@pytest.mark.parametrize("residual", [0.5, 0.2, 0.0])
def test_rollout_of_an_encoder_decoder(residual: float) -> None:
    theirs, own = bart_rows(residual)
    for of, right in ((None, theirs), ("encoder", theirs), ("decoder", own)):
        found = attribute(tiny.bart(), bart_inputs(), method="rollout", of=of, residual=residual)
        assert torch.allclose(torch.tensor(found.scores).double(), right, atol=1e-6)


def test_raw_attention_and_random() -> None:
    inputs = bart_inputs()
    found = attribute(tiny.bart(), inputs, method="raw_attention")
    right = layers(tiny.bart(), inputs, "cross_attentions")[-1].mean(1)[:, -1]
    assert torch.allclose(torch.tensor(found.scores).double(), right, atol=1e-6)
    found = attribute(tiny.bart(), inputs, method="raw_attention", of="decoder")
    right = layers(tiny.bart(), inputs, "decoder_attentions")[-1].mean(1)[:, -1]
    assert torch.allclose(torch.tensor(found.scores).double(), right, atol=1e-6)
    one, same, other = (
        attribute(tiny.vit(), {"pixel_values": PIXELS}, method="random", seed=seed).scores
        for seed in (0, 0, 1)
    )
    assert (one == same).all()
    assert (one != other).any()
    assert one.shape == (2, 17)


def test_a_given_position_is_followed() -> None:
    inputs = {"input_ids": tiny.ids(9, batch=2)}
    right = dense([one.mean(1) for one in layers(tiny.bert(), inputs)])
    found = attribute(tiny.bert(), inputs, method="rollout", at=torch.tensor([2, -4]))
    rows = torch.stack([right[0, 2], right[1, 5]])
    assert torch.allclose(torch.tensor(found.scores).double(), rows, atol=1e-6)


# flow


def slow_flow(maps: list[Tensor], source: int) -> list[float]:
    """networkx on the graph of one example, node by node."""
    networkx = pytest.importorskip("networkx")
    graph, n = networkx.DiGraph(), len(maps[0])
    for layer, one in enumerate(maps):
        for i in range(n):
            for j in range(n):
                capacity = 0.5 * float(one[i, j]) + 0.5 * (i == j)
                if capacity:
                    graph.add_edge((layer + 1, i), (layer, j), capacity=capacity)
    sinks = [(0, j) for j in range(n)]
    top = (len(maps), source)
    return [
        networkx.maximum_flow_value(graph, top, sink) if sink in graph else 0.0 for sink in sinks
    ]


@pytest.mark.parametrize("name", CASES)
def test_flow_is_what_networkx_finds(name: str) -> None:
    pytest.importorskip("scipy")
    make, inputs, place = CASES[name]
    maps = layers(make(), inputs)
    found = attribute(make(), inputs, method="flow").scores
    for example in range(2):
        n = maps[0].shape[-1]
        right = slow_flow([one[example].mean(0) for one in maps], place % n)
        assert found[example] == pytest.approx(right, abs=1e-6)


def test_flow_of_an_encoder_decoder_lies_between_rollout_and_its_cuts() -> None:
    pytest.importorskip("scipy")
    networkx = pytest.importorskip("networkx")
    model, inputs = tiny.bart(), bart_inputs()
    found = attribute(model, inputs, method="flow").scores
    graph, half = networkx.DiGraph(), 0.5
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions")
    read, own, cross = ([one[0].mean(0) for one in layers(model, inputs, name)] for name in names)
    for layer in range(2):
        for i, j in product(range(8), repeat=2):
            weight = half * float(read[layer][i, j]) + half * (i == j)
            graph.add_edge(("e", layer + 1, i), ("e", layer, j), capacity=weight)
        for i, j in product(range(5), repeat=2):
            weight = half * float(own[layer][i, j]) + half * (i == j)
            if weight:
                graph.add_edge(("d", 2 * layer + 1, i), ("d", 2 * layer, j), capacity=weight)
        for i in range(5):
            graph.add_edge(("d", 2 * layer + 2, i), ("d", 2 * layer + 1, i), capacity=half)
            for j in range(8):
                weight = half * float(cross[layer][i, j])
                graph.add_edge(("d", 2 * layer + 2, i), ("e", 2, j), capacity=weight)
    right = [networkx.maximum_flow_value(graph, ("d", 4, 4), ("e", 0, j)) for j in range(8)]
    assert found[0] == pytest.approx(right, abs=1e-6)
    rolled = attribute(model, inputs, method="rollout").scores
    assert (found >= rolled - 1e-6).all()


def test_what_cannot_be_done_is_refused() -> None:
    model, inputs = tiny.bert(), {"input_ids": tiny.ids(6)}
    with pytest.raises(ValueError, match="fuse='median'"):
        attribute(model, inputs, method="rollout", fuse="median")
    for method in ("rollout", "flow"):
        with pytest.raises(ValueError, match="residual=1"):
            attribute(model, inputs, method=method, residual=1)
    with pytest.raises(ValueError, match="256 positions at most"):
        attribute(model, {"input_ids": tiny.ids(257)}, method="flow")
    with pytest.raises(UnsupportedModelError, match="stacks"):
        attribute(_two_towers(), _pairs(), lambda logits, inputs: logits[:, 0], method="rollout")


def _two_towers() -> Any:
    from transformers import CLIPConfig, CLIPModel

    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**size, "image_size": 16, "patch_size": 8}
    text = {**size, "vocab_size": 60, "max_position_embeddings": 32}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def _pairs() -> dict[str, Tensor]:
    return {"input_ids": tiny.ids(6), "pixel_values": torch.randn(1, 3, 16, 16)}


def test_the_flow_solver_alone() -> None:
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("scipy")
    start, end = numpy.array([0, 0, 1, 2, 1]), numpy.array([1, 2, 3, 3, 2])
    capacity = numpy.array([0.7, 0.2, 0.3, 0.9, 0.25])
    found = flow.max_flows((start, end, capacity), 4, 0, [3, 2])
    assert found == pytest.approx([0.3 + 0.45, 0.45], abs=1e-8)
