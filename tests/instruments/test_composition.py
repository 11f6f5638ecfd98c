"""Composition between heads against whole matrices, and against matrices turned at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headwise.instruments.composition_scores import (
    Composition,
    _scores,
    composition,
    composition_by_component,
)
from headwise.instruments.induction_weights import token_matching
from headwise.instruments.qk_ov import ov, qk
from headwise.models import UnsupportedModelError
from headwise.models.backbones import Decoder
from headwise.parts import Attention, GroupedQuery
from tests.instruments import handmade, tiny
from tests.proof.weights import loader

MODELS = {
    "gpt2": tiny.gpt2,
    "llama": lambda: tiny.llama(num_hidden_layers=3),
    "our own": lambda: Decoder(
        40, 32, 3, mixer=lambda layer: Attention(32, 4, project=GroupedQuery(2), causal=True)
    ),
}


@pytest.fixture(params=list(MODELS), scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or "ln" in name:
                parameter.add_(torch.randn_like(parameter))
    return made.eval()


def slow(model: nn.Module, kind: str, writer: tuple[int, int], reader: tuple[int, int]) -> float:
    """As the formula stands, with matrices of width by width."""
    wrote = ov(model, *writer).dense().numpy()
    read = ov(model, *reader) if kind == "v" else qk(model, *reader)
    whole = read.dense().numpy().T if kind == "q" else read.dense().numpy()
    norm = np.linalg.norm
    return float(norm(whole @ wrote) / (norm(whole) * norm(wrote)))


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_against_whole_matrices(model: nn.Module, kind: str) -> None:
    found = composition(model)
    count = 0
    for writer in found.heads:
        for reader in found.heads:
            if reader[0] > writer[0]:
                told = found.of(writer, reader, kind)
                assert told.score == pytest.approx(slow(model, kind, writer, reader), rel=1e-9)
                count += 1
            else:
                with pytest.raises(ValueError, match="no later layer"):
                    found.of(writer, reader, kind)
    assert count == len(found.top(10**6, kind))


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_components_against_whole_matrices(model: nn.Module, kind: str) -> None:
    found = composition_by_component(model, (0, 2), (kind,))[kind]
    u, s, vh = ov(model, 0, 2).svd()
    for reader, scores in found.items():
        read = ov(model, *reader) if kind == "v" else qk(model, *reader)
        whole = read.dense().mT if kind == "q" else read.dense()
        for i in range(len(s)):
            one = s[i] * torch.outer(u[:, i], vh[i])
            expected = (whole @ one).norm() / (whole.norm() * one.norm())
            assert scores[i] == pytest.approx(float(expected), rel=1e-7)
        # the whole score is made of its components
        whole_score = composition(model, (kind,)).of((0, 2), reader, kind).score
        share = (s**2 / (s**2).sum()).numpy()
        assert whole_score == pytest.approx(float(np.sqrt((share * scores**2).sum())), rel=1e-9)


def test_random_turns_have_the_mean_and_spread_that_are_told() -> None:
    """z of circuits turned at random has mean 0 and variance 1, whatever their spectra are."""
    make = torch.Generator().manual_seed(0)
    width, turns = 12, 4000
    reader = torch.randn(1, 3, width, generator=make, dtype=torch.float64)
    reader[:, 0] *= 5
    writer = torch.randn(1, width, 4, generator=make, dtype=torch.float64)
    random = torch.randn(turns, width, width, generator=make, dtype=torch.float64)
    q, r = torch.linalg.qr(random)
    orthogonal = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    scores, z = _scores(reader, orthogonal @ writer)
    assert float(scores.pow(2).mean()) == pytest.approx(1 / width, rel=0.03)
    assert float(z.mean()) == pytest.approx(0, abs=0.06)
    assert float(z.var()) == pytest.approx(1, rel=0.06)


def test_top_is_in_order_and_of_what_was_asked(model: nn.Module) -> None:
    found = composition(model)
    table = found.top(7)
    assert len(table) == 7
    scores = [pair.score for pair in table]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == max(np.nanmax(found.scores[kind]) for kind in "qkv")
    assert {pair.kind for pair in found.top(5, "v")} == {"v"}
    by_z = [pair.z for pair in found.top(5, "k", by="z")]
    assert by_z == sorted(by_z, reverse=True)
    assert found.random == pytest.approx(32**-0.5)


def test_the_handmade_induction_circuit_stands_out() -> None:
    """Layer 0, head 0 writes the previous token where layer 1, head 0 reads its keys."""
    model = handmade.model()
    best = composition(model).top(1, "k")[0]
    assert (best.writer, best.reader) == ((0, 0), (1, 0))
    assert best.score == pytest.approx(handmade.CODE**-0.5, rel=1e-3)  # all that it reads
    (first, second, *_) = token_matching(model)
    assert (first.writer, first.reader) == ((0, 0), (1, 0))
    assert first.logits > 10 * abs(second.logits)


def slow_matching(
    model: nn.Module, writer: tuple[int, int], reader: tuple[int, int], x: Tensor, scale: float
) -> float:
    table = x @ qk(model, *reader).dense() @ ov(model, *writer).dense() @ x.mT * scale
    other = ~torch.eye(len(x), dtype=torch.bool)
    return float(table.diagonal().mean() - table[other].mean())


def test_token_matching_against_the_whole_table(model: nn.Module) -> None:
    embedding: Any = model.get_input_embeddings() if hasattr(model, "config") else None
    table = (model.embed.weight if embedding is None else embedding.weight).detach().double()
    centred = "Llama" not in type(model).__name__
    middle = table - table.mean(1, keepdim=True) if centred else table
    x = table / middle.pow(2).mean(1, keepdim=True).sqrt()
    found = token_matching(model)
    assert [m.logits for m in found] == sorted((m.logits for m in found), reverse=True)
    for match in found:
        expected = slow_matching(model, match.writer, match.reader, x, 8**-0.5)
        assert match.logits == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_what_cannot_be_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected some of q, k, v"):
        composition(model, ("q", "o"))
    found: Composition = composition(model, ("k",))
    with pytest.raises(ValueError, match="expected one of k"):
        found.top(kind="q")
    with pytest.raises(ValueError, match="by='rank'"):
        found.top(by="rank")
    with pytest.raises(ValueError, match=r"no head \(0, 9\)"):
        found.of((0, 9), (1, 0), "k")
    with pytest.raises(ValueError, match=r"no head \(7, 0\)"):
        composition_by_component(model, (7, 0))
    with pytest.raises(ValueError, match="say stack="):
        composition(tiny.bart())
    with pytest.raises(UnsupportedModelError, match="no embedding of tokens"):
        token_matching(tiny.vit())


@pytest.mark.parametrize("name", ["clean", "trained", "broken"])
def test_trained_induction(assets: Any, name: str) -> None:
    """The broken model was shrunk, not scrambled: its K-composition is as high as the trained
    model's, and what is gone is the strength. The clean one, whose heads have full rank, composes
    less than matrices turned at random, in the sense of Frobenius, and matches most."""
    from tests.proof.induction_gpt2 import as_gpt2

    source = loader(assets / "induction_head_2l" / "load_induction.py")
    model = as_gpt2(source.load(name))
    (match,) = token_matching(model)
    told = {kind: composition(model).of((0, 0), (1, 0), kind) for kind in "qkv"}
    if name == "broken":
        assert match.logits < 0.05
    else:
        assert match.logits > 8
    if name == "clean":
        assert told["k"].score < composition(model).random
    else:
        assert told["k"].score > 2.5 * max(told["q"].score, told["v"].score)
        assert told["k"].z > 20
    assert max(told, key=lambda kind: told[kind].score) == "k"
