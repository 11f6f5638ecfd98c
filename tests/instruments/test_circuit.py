"""Circuits of models whose circuit is known, and of a control without it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.instruments.circuit import Circuit, Edge, find_circuit
from headwise.instruments.faithfulness import completeness, faithfulness
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.nodes import Node
from headwise.models import recording, sites_of, touching, view
from tests.instruments import handmade, tiny
from tests.instruments.test_patching import prompts

METRIC = LogitDifference(torch.tensor([5, 9, 11]), torch.tensor([7, 8, 12]))


def induction() -> Any:
    """The hand-made GPT-2, whose second layer's first head copies the token that it finds."""
    model = handmade.model()
    attention: Any = model.transformer.h[1].attn
    with torch.no_grad():
        handmade._writes(attention, 0, handmade.TOKEN, handmade.TOKEN)
        attention.c_proj.weight *= 4
    return model


def broken() -> Any:
    """The same, and the head of the second layer looks for nothing."""
    model = induction()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[handmade.TOKEN, handmade._columns(0, 0)] = 0
    return model


def letters(examples: int = 12, n: int = 10) -> tuple[Tensor, Tensor, LogitDifference]:
    """Different letters, the last of which stood before; corrupted: it did not. What followed it
    is right, what follows another is wrong."""
    random = torch.Generator().manual_seed(1)
    clean = torch.stack([torch.randperm(80, generator=random)[: n + 1] for _ in range(examples)])
    clean, new = clean[:, :n], clean[:, n]
    at = torch.randint(1, n - 3, (examples,), generator=random)
    rows = torch.arange(examples)
    clean[:, -1] = clean[rows, at]
    corrupted = clean.clone()
    corrupted[rows, at] = new
    return clean, corrupted, LogitDifference(clean[rows, at + 1], clean[:, 0])


def test_the_induction_circuit_is_found_exactly():
    clean, corrupted, metric = letters()
    model = induction()
    with torch.no_grad():
        assert (model(clean).logits[:, -1].argmax(-1) == metric.right).float().mean() > 0.9
    for mlps in ("run", "hold"):
        found = find_circuit(model, clean, corrupted, metric, threshold=0.1, mlps=mlps)
        paths = {(str(e.sender), str(e.receiver)) for e in found.edges}
        assert paths == {("L1H0", "logits"), ("L0H0", "L1H0.k"), ("embed", "L0H0.v")}
        assert found.heads == [(0, 0), (1, 0)]
        assert all(edge.weight > 0.9 for edge in found.edges)
        for how in ("mean", "resample"):
            measured = faithfulness(model, found, clean, corrupted, metric, how)
            assert measured.recovered == pytest.approx(1, abs=0.05)
            assert measured.left == pytest.approx(0, abs=0.05)
            assert 0.9 < measured.share < 1.1


def test_the_broken_model_has_no_such_circuit():
    clean, corrupted, metric = letters()
    found = find_circuit(broken(), clean, corrupted, metric, threshold=0.1)
    assert not found.into("L1H0.k")


def test_a_wrong_circuit_is_neither_faithful_nor_complete():
    clean, corrupted, metric = letters()
    wrong = faithfulness(induction(), ["L0H1", "L1H3"], clean, corrupted, metric)
    assert wrong.recovered == pytest.approx(0, abs=0.05)
    assert wrong.left == pytest.approx(1, abs=0.05)
    told = completeness(induction(), ["L0H1"], clean, corrupted, metric, subsets=[["L0H1"]])
    assert told[0].incompleteness > 1


def test_a_circuit_without_a_backup_head_is_faithful_but_not_complete():
    """Two heads that do the same: one alone is a faithful circuit, and without it the model goes
    on, which only completeness tells (Wang et al., section 4)."""
    model = induction()
    attention: Any = model.transformer.h[1].attn
    code = handmade.CODE
    with torch.no_grad():  # head 2 as head 0
        for part in range(3):
            a, b = handmade._columns(0, part), handmade._columns(2, part)
            attention.c_attn.weight[:, b] = attention.c_attn.weight[:, a]
            attention.c_attn.bias[b] = attention.c_attn.bias[a]
        attention.c_proj.weight[2 * code : 3 * code] = attention.c_proj.weight[:code]
    clean, corrupted, metric = letters()
    one, both = ["L0H0", "L1H0"], ["L0H0", "L1H0", "L1H2"]
    alone = faithfulness(model, one, clean, corrupted, metric)
    assert alone.recovered > 0.6
    gap = alone.whole - alone.empty
    tried = {}
    for name, circuit in (("one", one), ("both", both)):
        told = completeness(model, circuit, clean, corrupted, metric, subsets=[["L1H0"]])
        tried[name] = told[0].incompleteness / gap
    assert tried["one"] > 0.5
    assert tried["both"] < 0.1


@torch.no_grad()
def taken_away(model: Any, clean: Tensor, instead: dict, kept: set) -> np.ndarray:
    """The metric with each head outside of `kept` at what is given, by plain hooks."""
    look = view(model)

    def writing(site: Any) -> Any:
        def write(there: Tensor) -> Tensor:
            made = there.clone()
            for head in range(there.shape[2]):
                if (site.layer, head) not in kept:
                    made[:, :, head] = instead[site][:, :, head]
            return made

        return write

    with touching(look, {site: writing(site) for site in instead}):
        return METRIC.score(model(clean).logits, {}).numpy()


@pytest.mark.parametrize("how", ["mean", "resample"])
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_faithfulness_is_runs_with_heads_taken_away(make, how):
    model, (clean, corrupted) = make(), prompts()
    look = view(model)
    with torch.no_grad(), recording(look, sites_of(look, "heads")) as kept:
        model(corrupted)
    instead = {
        site: value.mean(0, keepdim=True).expand_as(value) if how == "mean" else value
        for site, value in kept.items()
    }
    inside, every = {(0, 1), (1, 0), (1, 3)}, {(layer, h) for layer in (0, 1) for h in range(4)}
    names = [f"L{layer}H{h}" for layer, h in inside]
    found = faithfulness(model, names, clean, corrupted, METRIC, how)
    for value, left in (
        (found.whole, every),
        (found.circuit, inside),
        (found.complement, every - inside),
        (found.empty, set()),
    ):
        expected = taken_away(model, clean, instead, left).mean()
        assert value == pytest.approx(expected, abs=2e-4)
    told = completeness(model, names, clean, corrupted, METRIC, how, subsets=[["L1H0", "L0H1"]])
    assert told[0].circuit == pytest.approx(
        taken_away(model, clean, instead, {(1, 3)}).mean(), abs=2e-4
    )
    assert told[0].model == pytest.approx(
        taken_away(model, clean, instead, every - {(1, 0), (0, 1)}).mean(), abs=2e-4
    )


def test_random_subsets_are_the_same_for_the_same_seed():
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    given = (model, ["L0H0", "L1H0", "L1H1"], clean, corrupted, METRIC)
    first, again, other = (completeness(*given, subsets=6, seed=seed) for seed in (0, 0, 1))
    assert len(first) == 3 + 6
    assert [one.without for one in first] == [one.without for one in again]
    assert [one.without for one in first] != [one.without for one in other]


def test_thresholds():
    """Fewer paths at higher thresholds, and each with at least so much."""
    model, (clean, corrupted) = tiny.llama(), prompts()
    counts = []
    for threshold in (0.05, 0.2, 0.5):
        found = find_circuit(model, clean, corrupted, METRIC, threshold, mlps="hold")
        assert all(abs(edge.weight) >= threshold for edge in found.edges)
        counts.append(len(found.edges))
    assert counts[0] > counts[1] > counts[2]


def test_the_circuit_as_data():
    edges = (
        Edge(Node.of("L1H0"), Node.of("logits"), 0.9, 0.1),
        Edge(Node.of("L0H2"), Node.of("L1H0.k"), -0.4),
    )
    circuit = Circuit(edges, "logit difference", 0.1)
    assert list(map(str, circuit.nodes)) == ["L0H2", "L1H0"]
    assert circuit.into("L1H0.k") == [edges[1]]
    told = circuit.record()
    assert told["edges"][1] == {"sender": "L0H2", "receiver": "L1H0.k", "weight": -0.4}
    assert "L0H2 -> L1H0.k (-0.40)" in repr(circuit)
    other = Circuit((Edge(Node.of("L1H0"), Node.of("logits"), 1.0),))
    assert circuit.overlap(other) == 0.5
    assert np.isnan(Circuit(()).overlap(Circuit(())))


def test_what_cannot_be_done_is_said():
    model, (clean, corrupted) = tiny.gpt2(), prompts()
    with pytest.raises(ValueError, match="no answer to explain"):
        find_circuit(model, clean, clean, METRIC)
    with pytest.raises(ValueError, match="threshold=0"):
        find_circuit(model, clean, corrupted, METRIC, 0)
    with pytest.raises(ValueError, match="how='zero'"):
        faithfulness(model, ["L0H0"], clean, corrupted, METRIC, "zero")
    with pytest.raises(ValueError, match="L5H0 is no component"):
        faithfulness(model, ["L5H0"], clean, corrupted, METRIC)
    sides = ([prompts(n, 1, n)[i][0] for n in (5, 7)] for i in (0, 1))
    with pytest.raises(ValueError, match="how='resample'"):
        faithfulness(model, ["L0H0"], *sides, LogitDifference(3, 4))
