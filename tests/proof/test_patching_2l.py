"""The induction circuit in weights that learned it: layer 0's head hands layer 1's keys the token
before (K-composition, Elhage et al. 2021). In the broken model that path leads nowhere.

Weights: JasonGross/guarantees-based-mechanistic-interpretability (MIT), see test_induction_2l.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.instruments.circuit import find_circuit
from headwise.instruments.faithfulness import faithfulness
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.patching import patch
from headwise.instruments.paths import path_patch
from tests.proof.induction_gpt2 import as_gpt2
from tests.proof.weights import loader

RECEIVERS = ("L1H0.q", "L1H0.k", "L1H0.v", "logits")


@pytest.fixture(scope="module")
def source(assets):
    return loader(assets / "induction_head_2l" / "load_induction.py")


def pairs(source: Any, examples: int = 64) -> tuple[Tensor, Tensor, LogitDifference]:
    """Eight letters, the last of which stood before, and the same with another letter in that
    place. Right is what followed it, wrong what follows the place two further on (cyclically)."""
    clean, answer, place = source.batch(examples)
    rows = torch.arange(examples)
    corrupted = clean.clone()
    for row in rows.tolist():
        free = next(x for x in range(26) if x not in clean[row].tolist())
        corrupted[row, place[row] - 1] = free
    other = torch.where(place + 2 < 7, place + 2, (place + 2) % 7)
    wrong = clean[rows, other]
    clash = wrong == answer
    return clean, corrupted, LogitDifference(answer, torch.where(clash, clean[rows, 0], wrong))


@pytest.mark.parametrize("name", ["clean", "trained"])
def test_the_keys_of_layer_1_are_what_layer_0_is_for(source, name):
    clean, corrupted, metric = pairs(source)
    model = as_gpt2(source.load(name))
    table = path_patch(model, clean, corrupted, metric, RECEIVERS, ["L0H0"])
    queries, keys, values, direct = 1 - table.normalised[0]
    assert table.gap > 5
    assert keys > 0.6
    assert max(abs(queries), abs(values), abs(direct)) < 0.2 * keys
    found = find_circuit(model, clean, corrupted, metric, threshold=0.3)
    between = {(str(e.sender), str(e.receiver)) for e in found.edges if e.sender.kind == "head"}
    assert between == {("L0H0", "L1H0.k"), ("L1H0", "logits")}


def test_not_so_in_the_broken_model(source):
    clean, corrupted, metric = pairs(source)
    whole = path_patch(as_gpt2(source.load("clean")), clean, corrupted, metric, ["L1H0.k"])
    table = path_patch(as_gpt2(source.load("broken")), clean, corrupted, metric, ["L1H0.k"])
    at = table.axes["sender"].index("L0H0")
    assert abs(table.effects[at, 0]) < 0.05 * abs(whole.effects[at, 0])


def test_where_the_information_stands(source):
    """Before layer 0 at the earlier place, between the layers one further on, after layer 1 at
    the end: the circuit, position by position."""
    clean, corrupted, metric = pairs(source)
    _, _, place = source.batch(64)
    spots = {"earlier": place - 1, "after it": place, "end": torch.full_like(place, 7)}
    table = patch(as_gpt2(source.load("clean")), clean, corrupted, metric, positions=spots)
    assert table.normalised.argmax(1).tolist() == [0, 1, 2]
    assert table.normalised.max(1).min() > 0.7


@pytest.mark.parametrize("name", ["clean", "trained"])
def test_both_heads_are_needed(source, name):
    clean, corrupted, metric = pairs(source)
    model = as_gpt2(source.load(name))
    both = faithfulness(model, ["L0H0", "L1H0"], clean, corrupted, metric)
    one = faithfulness(model, ["L1H0"], clean, corrupted, metric)
    assert both.recovered == pytest.approx(1)  # there is nothing else
    assert one.recovered < 0.5
