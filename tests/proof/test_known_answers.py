"""Causes, found in models whose circuit is known: exactly the truth, and another in the control
that does the same in another way.

What an instrument must say of single paths is worked out beside it, by matrices
(tests/tasks/by_hand.py).
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from headwise.instruments import patch
from headwise.instruments.ablations import ablation
from headwise.instruments.circuit import find_circuit
from headwise.instruments.faithfulness import completeness, faithfulness
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.paths import path_patch
from headwise.tasks import circuits
from headwise.tasks.circuits import Contrast, KnownCircuit, KnownEdge
from tests.tasks.by_hand import all_edges, by_hand, components

Heads = dict[tuple[int, int], float]
NAMES = [(name, control) for name in circuits.ALL for control in (False, True)]
every = pytest.mark.parametrize(
    ("name", "control"), NAMES, ids=[f"{n}{'-control' * c}" for n, c in NAMES]
)
NOTHING = 1e-3
"""Of the answer, or of 10 logits."""


@cache
def made(name: str, control: bool) -> KnownCircuit:
    known: KnownCircuit = circuits.ALL[name]()
    if not control:
        return known
    assert known.control is not None
    return known.control()


@cache
def pairs(name: str, control: bool) -> tuple[Contrast, LogitDifference]:
    pair = made(name, control).contrast(16, 0)
    return pair, LogitDifference(pair.right, pair.wrong, pair.at)


def by_head(table: Any) -> Heads:
    return {
        (layer, head): float(table[layer, head])
        for layer in range(table.shape[0])
        for head in range(table.shape[1])
    }


@every
@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_ablation(name: str, control: bool, how: str) -> None:
    """Taking a part away costs logits where it is of the circuit, and nothing elsewhere."""
    known, (pair, metric) = made(name, control), pairs(name, control)
    atlas = ablation(known.model, pair.clean, metric, how=how, what=("heads", "mlp"))
    places = zip(atlas.heads["layer"], atlas.heads["head"], atlas.heads["effect"], strict=True)
    for layer, head, effect in places:
        if (layer, head) in known.heads:
            assert effect < -2
        else:
            assert abs(effect) < NOTHING
    for layer, effect in enumerate(atlas.layers.get("mlp_effect", [])):
        if layer in known.feeds:
            assert effect < -2
        else:
            assert np.isnan(effect) or abs(effect) < NOTHING


@every
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_heads(name: str, control: bool, direction: str) -> None:
    known, (pair, metric) = made(name, control), pairs(name, control)
    table = patch(known.model, pair.clean, pair.corrupted, metric, "heads", direction=direction)
    unchanged = 1.0 if direction == "noise" else 0.0
    moved = {head for head, x in by_head(table.normalised).items() if abs(x - unchanged) > NOTHING}
    assert moved == known.heads
    if len(known.heads) == len({layer for layer, _ in known.heads}):  # one after the other
        told = by_head(table.normalised)
        assert all(abs(told[head] - (1 - unchanged)) < 0.01 for head in known.heads)


@every
@pytest.mark.parametrize("site", ["queries", "keys", "values"])
def test_patching_what_heads_read(name: str, control: bool, site: str) -> None:
    """Only heads of the circuit have queries, keys and values that matter."""
    known, (pair, metric) = made(name, control), pairs(name, control)
    table = patch(known.model, pair.clean, pair.corrupted, metric, site)
    moved = {head for head, x in by_head(table.normalised).items() if abs(x) > NOTHING}
    assert moved <= known.heads
    read = {edge.receiver for edge in known.edges}
    for layer, head in moved:
        assert f"L{layer}H{head}.{site[0]}" in read


@every
@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_estimates_name_no_other_head(name: str, control: bool, method: str) -> None:
    """Gradients do not see through saturated maps and steps, so they miss what is behind such;
    what they do find is of the circuit."""
    known, (pair, metric) = made(name, control), pairs(name, control)
    table = patch(known.model, pair.clean, pair.corrupted, metric, "heads", method=method)
    found = {head for head, x in by_head(table.normalised).items() if abs(x) > 0.01}
    assert found <= known.heads
    if not known.feeds and name != "addition":
        last = max(layer for layer, _ in known.heads)
        assert {head for head in known.heads if head[0] == last} <= found


def test_a_gradient_misses_what_integration_finds() -> None:
    known, (pair, metric) = made("induction", False), pairs("induction", False)
    found = {}
    for method in ("gradient", "integrated"):
        table = patch(known.model, pair.clean, pair.corrupted, metric, "heads", method=method)
        found[method] = by_head(table.normalised)[0, 1]
    assert abs(found["gradient"]) < 0.01  # the previous-token head, through a saturated map
    assert found["integrated"] > 0.5


def shares(known: KnownCircuit, pair: Contrast) -> dict[KnownEdge, float]:
    """What each path carries of the answer, by hand: lost where it brings what it has on the
    corrupted input."""
    theirs = components(known, pair.corrupted)

    def answer(logits: torch.Tensor) -> float:
        rows = logits if logits.dim() == 2 else logits[:, pair.at]
        found = rows.gather(1, pair.right[:, None]) - rows.gather(1, pair.wrong[:, None])
        return float(found.mean())

    clean, corrupted = (answer(by_hand(known, x)) for x in (pair.clean, pair.corrupted))
    changed = {
        edge: answer(by_hand(known, pair.clean, edge, theirs[edge.sender]))
        for edge in all_edges(known)
    }
    return {edge: (clean - x) / (clean - corrupted) for edge, x in changed.items()}


@every
def test_the_circuit_is_found(name: str, control: bool) -> None:
    """Its heads and feed-forward layers, and exactly those of its paths along which the two
    inputs differ, each with its share."""
    known, (pair, metric) = made(name, control), pairs(name, control)
    truth = {edge: x for edge, x in shares(known, pair).items() if abs(x) >= 0.05}
    assert set(truth) <= known.edges
    found = find_circuit(known.model, pair.clean, pair.corrupted, metric, mlps="hold")
    told = {KnownEdge(str(e.sender), str(e.receiver)): e.weight for e in found.edges}
    assert set(told) == set(truth)
    for edge, share in truth.items():
        assert told[edge] == pytest.approx(share, abs=5e-3)
    assert set(found.heads) == known.heads
    assert {n.layer for n in found.nodes if n.kind == "mlp"} == known.feeds


@pytest.mark.parametrize("name", ["induction", "indirect_object"])
def test_every_path_by_hand(name: str) -> None:
    """Also those that carry nothing."""
    known, (pair, metric) = made(name, False), pairs(name, False)
    truth = shares(known, pair)
    receivers = list(dict.fromkeys(edge.receiver for edge in truth))
    table = path_patch(known.model, pair.clean, pair.corrupted, metric, receivers, mlps="hold")
    for i, sender in enumerate(table.axes["sender"]):
        for j, receiver in enumerate(table.axes["receiver"]):
            want = truth.get(KnownEdge(sender, receiver), 0.0)
            assert 1 - table.normalised[i, j] == pytest.approx(want, abs=2e-3)


@every
def test_the_circuit_alone_does_it(name: str, control: bool) -> None:
    known, (pair, metric) = made(name, control), pairs(name, control)
    names = [f"L{layer}H{head}" for layer, head in sorted(known.heads)]
    given = (known.model, names, pair.clean, pair.corrupted, metric)
    alone = faithfulness(*given, how="resample", mlps="run")
    assert alone.recovered == pytest.approx(1.0, abs=1e-3)
    assert alone.left == pytest.approx(0.0, abs=1e-3)
    for found in completeness(*given, how="resample", mlps="run", subsets=3):
        assert found.incompleteness < 0.01


@pytest.mark.parametrize("name", circuits.ALL)
def test_the_other_ones_heads_do_not_do_it(name: str) -> None:
    """The heads of the circuit, alone in the control, give nothing of the answer."""
    known, control = made(name, False), made(name, True)
    pair, metric = pairs(name, True)
    names = [f"L{layer}H{head}" for layer, head in sorted(known.heads)]
    alone = faithfulness(
        control.model, names, pair.clean, pair.corrupted, metric, how="resample", mlps="run"
    )
    assert alone.recovered == pytest.approx(0.0, abs=1e-3)
    assert alone.left == pytest.approx(1.0, abs=1e-3)
