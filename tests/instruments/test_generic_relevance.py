"""Generic relevance against whole matrices in float64: eager attention, its gradients, loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.instruments import attribute, generic_relevance
from headwise.instruments.bimodal import bimodal
from headwise.instruments.generic_relevance import generic
from headwise.instruments.metrics import LogitDifference, metric_of
from headwise.instruments.targets import LogitOf
from headwise.models import UnsupportedModelError, view
from headwise.models.backbones import Decoder
from headwise.models.sites import Site, touching
from headwise.parts import Attention
from headwise.parts.output.gate import HeadGate
from tests.instruments import tiny


def fused(weights: list[Tensor], score: Tensor) -> list[Tensor]:
    """A_bar of each layer `(batch, n_q, n_k)`, from maps that are part of the graph."""
    slopes = torch.autograd.grad(score.sum(), weights)
    return [(g * w).clamp(min=0).mean(1).detach() for g, w in zip(slopes, weights, strict=True)]


def eager(model: Any, inputs: dict[str, Tensor]) -> Any:
    model.double().set_attn_implementation("eager")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return model(**inputs, output_attentions=True)


def by_self_attention(maps: list[Tensor]) -> Tensor:
    relevance = torch.eye(maps[0].shape[-1], dtype=torch.float64).repeat(len(maps[0]), 1, 1)
    for one in maps:
        relevance = relevance + one @ relevance
    return relevance


def normalized(relevance: Tensor) -> Tensor:
    own = torch.eye(relevance.shape[-1], dtype=relevance.dtype)
    beside = relevance - own
    return torch.nan_to_num(beside / beside.sum(-1, keepdim=True)) + own


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 9, dtype=torch.long)
MASK[1, 6:] = 0
CASES: dict[str, tuple[Callable[[], Any], dict[str, Tensor], Any, int]] = {
    "bert": (tiny.bert, {"input_ids": tiny.ids(9, batch=2)}, LogitOf(7, at=3), 3),
    "vit": (tiny.vit, {"pixel_values": PIXELS}, LogitOf(1), 0),
    "llama": (tiny.llama, {"input_ids": tiny.ids(9, batch=2)}, LogitDifference(7, 9), -1),
    "gpt2": (tiny.gpt2, {"input_ids": tiny.ids(9, batch=2)}, LogitOf(7), -1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [2**22, 70])
def test_self_attention_is_the_product_of_whole_matrices(
    name: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, inputs, metric, place = CASES[name]
    monkeypatch.setattr(generic_relevance, "TILE", tile)
    found = generic(view(make()), inputs, metric)
    output = eager(make(), inputs)
    score = metric.score(output.logits, inputs)
    right = by_self_attention(fused(list(output.attentions), score))[:, place]
    assert (right.amax() - 1) > 1e-3 or right.amin() >= 0
    assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-5)
    bare = generic(view(make()), inputs, metric, identity=False)
    assert torch.allclose((found - bare).sum(-1), torch.ones(2), atol=1e-5)


def test_padding_gets_nothing_and_changes_nothing() -> None:
    ids = tiny.ids(9, batch=2)
    model = tiny.bert()
    padded = attribute(
        model, {"input_ids": ids, "attention_mask": MASK}, LogitOf(7, at=2), method="generic"
    )
    alone = attribute(model, ids[1:, :6], LogitOf(7, at=2), method="generic")
    assert torch.allclose(
        torch.tensor(padded.scores[1][:6]), torch.tensor(alone.scores[0]), atol=1e-4
    )
    assert (padded.scores[1][6:] == 0).all()
    assert [len(row) for row in padded.top(9)] == [9, 6]


@pytest.mark.parametrize("tile", [2**22, 50])
def test_encoder_decoder_is_the_rule_for_cross_attention(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generic_relevance, "TILE", tile)
    inputs = {"input_ids": tiny.ids(8, batch=2), "decoder_input_ids": tiny.ids(5, 1, batch=2)}
    metric = LogitOf(11)
    look = view(tiny.bart())
    encoder, decoder = generic(look, inputs, metric), generic(look, inputs, metric, of="decoder")
    output = eager(tiny.bart(), inputs)
    groups = [output.encoder_attentions, output.decoder_attentions, output.cross_attentions]
    maps = fused([w for g in groups for w in g], metric.score(output.logits, inputs))
    read, own, cross = maps[:2], maps[2:4], maps[4:]
    of_encoder = by_self_attention(read)
    of_decoder = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    between = torch.zeros(2, 5, 8, dtype=torch.float64)
    for mine, theirs in zip(own, cross, strict=True):
        between = between + mine @ between
        of_decoder = of_decoder + mine @ of_decoder
        between = between + normalized(of_decoder).mT @ theirs @ normalized(of_encoder)
    assert torch.allclose(decoder.double(), of_decoder[:, -1], rtol=1e-4, atol=1e-5)
    assert between[:, -1].amax() > 1e-3
    assert torch.allclose(encoder.double(), between[:, -1], rtol=1e-4, atol=1e-6)


def test_several_positions_are_read_by_the_norms_of_the_gradient() -> None:
    inputs = {"input_ids": tiny.ids(9)}

    def both(logits: Tensor, inputs: Any) -> Tensor:
        return logits[:, 2, 5] + 3 * logits[:, 6, 5]

    found = attribute(tiny.bert(), inputs, both, method="generic").scores[0]
    model = tiny.bert()
    output = eager(model, inputs)
    rows = by_self_attention(fused(list(output.attentions), both(output.logits, inputs)))[0]
    hidden = model.bert(**inputs).last_hidden_state
    (slope,) = torch.autograd.grad(both(model.cls(hidden), inputs).sum(), hidden)
    weights = slope[0].norm(dim=-1)
    weights = weights / weights.sum()
    assert (weights > 1e-3).sum() == 2
    assert torch.allclose(torch.tensor(found).double(), weights @ rows, rtol=1e-4, atol=1e-5)


def test_our_own_models_and_frozen_ones() -> None:
    torch.manual_seed(0)
    model = Decoder(30, 16, 2, mixer=lambda layer: Attention(16, 4, causal=True)).eval()
    ids = torch.randint(0, 30, (2, 7))
    look = view(model)
    found = generic(look, {"input_ids": ids}, LogitOf(3))
    relevance = torch.eye(7).repeat(2, 1, 1)
    maps, row = generic_relevance.relevant_maps(look, {"input_ids": ids}, LogitOf(3))
    assert torch.equal(row.argmax(-1), torch.tensor([6, 6]))
    assert torch.allclose(row.sum(-1), torch.ones(2))
    for one in maps:
        # the slope of a map, by what the score does when one weight grows
        weights = one.kept.map.dense()
        slope = one.gradient.float() @ one.kept.value.float().mT
        relevance = relevance + (weights * slope).clamp(min=0).mean(1) @ relevance
    assert torch.allclose(found, relevance[:, -1], atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    assert torch.allclose(generic(look, {"input_ids": ids}, LogitOf(3)), found, atol=1e-6)


def test_the_gradient_of_a_map_is_that_of_finite_differences() -> None:
    """dy/dA = dy/dO V^T, where A is written by an edit: one weight more, and what it changes."""
    model = tiny.gpt2().double()
    inputs = {"input_ids": tiny.ids(6)}
    look, metric = view(model), LogitOf(9)
    maps, _ = generic_relevance.relevant_maps(look, inputs, metric)
    one, (head, query, key), small = maps[1], (2, 5, 1), 1e-4
    slope = one.gradient[0, head, query] @ one.kept.value[0, head, key]

    def write(out: Tensor) -> Tensor:
        more = out.clone()
        more[0, query, head] += small * one.kept.value[0, head, key]
        return more

    with torch.no_grad():
        before = metric.score(model(**inputs).logits, inputs)
        with touching(look, {Site("heads", 1): write}):
            after = metric.score(model(**inputs).logits, inputs)
    assert torch.allclose((after - before) / small, slope, rtol=1e-3)


def test_two_streams_that_attend_to_each_other() -> None:
    """`bimodal` against loops over elements of the paper's equations 6 to 11."""
    random = torch.Generator().manual_seed(0)

    def made(rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=random, dtype=torch.float64)

    a, b = 4, 3
    steps = [
        ("t", "t", made(a, a)),
        ("i", "i", made(b, b)),
        ("t", "i", made(a, b)),
        ("i", "t", made(b, a)),
        ("t", "t", made(a, a)),
        ("t", "i", made(a, b)),
    ]
    found = bimodal([[step] for step in steps])
    sizes = {"t": a, "i": b}
    slow = {
        (s, q): [[float(s == q and i == j) for j in range(m)] for i in range(n)]
        for s, n in sizes.items()
        for q, m in sizes.items()
    }

    def product(x: Any, y: Any) -> Any:
        return [
            [sum(x[i][k] * y[k][j] for k in range(len(y))) for j in range(len(y[0]))]
            for i in range(len(x))
        ]

    def add(x: Any, y: Any) -> Any:
        return [[p + q for p, q in zip(r, s, strict=True)] for r, s in zip(x, y, strict=True)]

    def share(x: Any) -> Any:
        rows = []
        for i, row in enumerate(x):
            beside = [v - (i == j) for j, v in enumerate(row)]
            total = sum(beside)
            rows.append([(v / total if total else 0) + (i == j) for j, v in enumerate(beside)])
        return rows

    for s, q, weights in steps:
        w = weights.tolist()
        other = "i" if s == "t" else "t"
        if s == q:
            more = {(s, s): product(w, slow[s, s]), (s, other): product(w, slow[s, other])}
        else:
            turned = [list(c) for c in zip(*share(slow[s, s]), strict=True)]
            more = {
                (s, q): product(product(turned, w), share(slow[q, q])),
                (s, s): product(w, slow[q, s]),
            }
        for key, value in more.items():
            slow[key] = add(slow[key], value)
    for key, value in slow.items():
        assert torch.allclose(found[key], torch.tensor(value, dtype=torch.float64), atol=1e-10)
    with pytest.raises(ValueError, match="4,096"):
        bimodal([[("t", "t", torch.zeros(1, 1).expand(5000, 5000))]])


def test_what_cannot_be_followed_is_refused() -> None:
    look = view(tiny.bert())
    inputs = {"input_ids": tiny.ids(6)}
    with pytest.raises(ValueError, match="of='decoder'"):
        generic(look, inputs, LogitOf(3), of="decoder")
    with pytest.raises(ValueError, match="outside of the 6 positions"):
        generic(look, inputs, LogitOf(3), at=6)
    with pytest.raises(ValueError, match="no gradient"):
        generic(look, inputs, _constant())
    gated = Decoder(30, 16, 1, mixer=lambda layer: _gated()).eval()
    with pytest.raises(UnsupportedModelError):
        generic(view(gated), {"input_ids": torch.randint(0, 30, (1, 5))}, LogitOf(3))


def _constant() -> Any:
    return metric_of(lambda logits, inputs: torch.ones(len(logits)))


def _gated() -> Attention:
    return Attention(16, 4, causal=True, output=HeadGate(0.5))
