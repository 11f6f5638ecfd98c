"""What is read off models whose circuit is known: attribution, tracing, lenses, probes, weights,
edits. Where an instrument speaks of something else than causes, the decoys show it."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from headwise.edits.facts import edit_fact
from headwise.instruments import attribute, composition, lens
from headwise.instruments.direct_attribution import direct_effects
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.probing import probe
from headwise.instruments.tracing import trace
from headwise.tasks import circuits
from headwise.tasks.circuits import KnownCircuit
from headwise.tasks.facts import Facts

BY_GRADIENT = ("gradient_x_input", "integrated_gradients", "lrp", "pa_lrp", "generic")
BY_MAPS = ("rollout", "flow")


@cache
def made(name: str, control: bool = False) -> KnownCircuit:
    known: KnownCircuit = circuits.ALL[name]()
    if not control:
        return known
    assert known.control is not None
    return known.control()


def attributed(known: KnownCircuit, method: str) -> tuple[np.ndarray, Tensor]:
    """Scores `(examples, n)` of the answer against the corrupted one, and the prompts."""
    pair = known.contrast(12, 0)
    metric = LogitDifference(pair.right, pair.wrong, pair.at)
    found = attribute(known.model, pair.clean, target=metric, method=method)
    return np.stack(list(found.scores)), pair.clean["input_ids"]


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("method", BY_GRADIENT)
def test_the_answer_goes_back_to_where_it_is_copied_from(method: str, control: bool) -> None:
    scores, ids = attributed(made("induction", control), method)
    assert (scores.argmax(1) == 4).all()
    scores, ids = attributed(made("fact_lookup", control), method)
    entity = (ids < made("fact_lookup").task.entities).long().argmax(1)  # type: ignore[attr-defined]
    assert (scores.argmax(1) == entity.numpy()).all()


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("method", BY_MAPS)
def test_maps_alone_go_back_to_the_sinks(method: str, control: bool) -> None:
    """Rollout and flow count every head alike, also those whose output nobody reads."""
    scores, _ = attributed(made("induction", control), method)
    assert not (scores.argmax(1) == 4).any()


def test_attribution_tells_inhibition_from_counting() -> None:
    """Where the other name is held back by queries, all of the gradient is on the right name;
    where names are counted, the three mentions add up to the answer."""
    pair = made("indirect_object").contrast(12, 0)
    right = pair.clean["input_ids"] == pair.right[:, None]
    named = right | (pair.clean["input_ids"] == pair.wrong[:, None])
    assert (named.sum(1) == 3).all()
    scores, _ = attributed(made("indirect_object"), "gradient_x_input")
    assert np.allclose(scores[right.numpy()], 10, atol=0.1)
    assert np.allclose(scores[~right.numpy()], 0, atol=0.1)
    scores, _ = attributed(made("indirect_object", True), "gradient_x_input")
    assert np.allclose(np.abs(scores[named.numpy()]), 10, atol=0.1)
    assert np.allclose(scores[~named.numpy()], 0, atol=0.1)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", circuits.ALL)
def test_direct_effects(name: str, control: bool) -> None:
    """What writes into the answer is what has an edge to the logits, and it is all of it."""
    known = made(name, control)
    pair = known.contrast(16, 0)
    found = direct_effects(
        known.model, pair.clean, LogitDifference(pair.right, pair.wrong, pair.at)
    )
    ends = {edge.sender for edge in known.edges if edge.receiver == "logits"}
    heads = dict(zip(found.places, found.heads.mean(0), strict=True))
    told = {f"L{layer}H{head}": x for (_, _, layer, head), x in heads.items()}
    told |= {f"L{layer} mlp": x for layer, x in enumerate(found.mlps.mean(0))}
    assert {sender for sender, x in told.items() if abs(x) > 1e-3} == ends
    assert sum(told.values()) == pytest.approx(float(found.score.mean()), abs=1e-3)


def facts(control: bool) -> tuple[KnownCircuit, Facts, Tensor, Tensor, Tensor]:
    known = made("fact_lookup", control)
    task = known.task
    assert isinstance(task, Facts)
    batch = task.all()
    return known, task, batch.inputs["input_ids"], batch.facts["subject"], batch.targets


@pytest.mark.parametrize("control", [False, True])
def test_tracing_finds_where_the_fact_is(control: bool) -> None:
    """The subject's residual brings all back up to the layer whose heads read it, and the last
    token's behind them; the memory alone brings some of it back, where it is the memory."""
    known, _, ids, subject, targets = facts(control)
    subjects = [[int(at)] for at in subject]
    every = np.arange(len(ids))

    def traced(site: str) -> tuple[np.ndarray, np.ndarray, float]:
        table = trace(
            known.model, {"input_ids": ids}, subjects, targets[:, -1], site, samples=4, window=1
        )
        at = table.examples[every, :, subject.numpy()].mean(0)
        worst = float(table.corrupted.mean())
        assert table.clean.mean() > 0.99
        assert worst < 0.6
        return at - worst, table.examples[:, :, -1].mean(0) - worst, 1 - worst

    at, last, gap = traced("residual")
    assert at[:3] == pytest.approx([gap] * 3, abs=0.02)
    assert at[3] == pytest.approx(0, abs=1e-3)
    assert last == pytest.approx([0, 0, 0, gap], abs=0.02)
    at, last, _ = traced("mlp")  # only the memory's layer has one
    assert abs(last[0]) < 1e-3
    assert abs(at[0]) < 1e-3 if control else at[0] > 0.1
    at, last, gap = traced("attention")
    assert np.abs(at).max() < 1e-3
    assert last == pytest.approx([0, 0, gap], abs=0.02)


@pytest.mark.parametrize("control", [False, True])
def test_an_edit_changes_one_fact(control: bool) -> None:
    """Rank one, of keys that overlap: with their covariance nothing else changes, without it other
    facts do. It takes in the control as well, where the fact stands elsewhere: that an edit works
    does not show where a fact was (Hase et al., arXiv 2301.04213)."""
    known, task, ids, subject, targets = facts(control)
    asked, other = 5, 4  # the same subject's two relations
    value = int(task.table[asked // 2, asked % 2] + 3) % task.values
    wanted = task.first_value + value
    usual = torch.cat([task.all(step).inputs["input_ids"] for step in range(4)])
    moved = {}
    with torch.no_grad():
        before = known.model(ids)[:, -1]
    for statistics in (usual, "identity"):
        patch = edit_fact(
            known.model,
            ids[asked],
            int(subject[asked]),
            [wanted],
            layers=1,
            statistics=statistics,
        )
        with patch, torch.no_grad():
            after = known.model(ids)[:, -1]
        right = targets[:, -1].clone()
        right[asked] = wanted
        assert torch.equal(after.argmax(-1), right)
        change = (after - before).abs().amax(1)
        assert change[other] < 1
        change[asked] = change[other] = 0
        moved[isinstance(statistics, str)] = float(change.max())
    assert moved[False] < 0.01  # logits
    assert moved[True] > 1
    with torch.no_grad():
        assert torch.equal(known.model(ids)[:, -1], before)


def test_a_lens_sees_the_answer_where_it_is_written() -> None:
    for control in (False, True):
        known, _, ids, _, targets = facts(control)
        found = lens(known.model, {"input_ids": ids}, target=targets)
        told = found.probability[:, found.target >= 0]
        assert told[:3] == pytest.approx(1 / 32, abs=1e-3)  # one of the vocabulary
        assert told[3].min() > 0.99


@pytest.mark.parametrize("control", [False, True])
def test_weights_show_what_could_be_read_not_what_is(control: bool) -> None:
    """K-composition with the previous-token head, of the induction head and of its decoy alike,
    and in the control, where neither does anything."""
    scores = composition(made("induction", control).model)
    found = {
        (writer, reader, kind)
        for kind, table in scores.scores.items()
        for i, writer in enumerate(scores.heads)
        for j, reader in enumerate(scores.heads)
        if table[i, j] > 0.05
    }
    assert found == {((0, 1), (1, 1), "k"), ((0, 1), (1, 2), "k")}


def test_a_probe_finds_also_what_nobody_reads() -> None:
    """Which token stood before can be read off the previous-token head and off its decoy."""
    known = made("induction")
    ids = known.contrast(400, 3).clean["input_ids"]
    found = probe(known.model, {"input_ids": ids}, ids[:, -2], "heads", folds=3)
    told = {
        (int(layer), int(head))
        for layer, head, score in zip(found.layer, found.head, found.score, strict=True)
        if score > 0.9
    }
    assert told == {(0, 1), (0, 2)}
    assert found.controls["shuffled"].mean() < 0.2


def test_a_probe_finds_the_sum_behind_the_products() -> None:
    """The answer modulo p is no linear function of what stands at = before the feed-forward layer,
    of whose waves it is one behind it."""
    for control in (False, True):
        known = made("modular_fourier", control)
        pairs = known.task.table  # type: ignore[attr-defined]
        sign = torch.full_like(pairs[:, 0], known.task.p)  # type: ignore[attr-defined]
        inputs = {"input_ids": torch.stack([pairs[:, 0], sign, pairs[:, 1], sign + 1], 1)}
        answers = pairs[:, 2]
        found = probe(known.model, inputs, answers, "mlp", folds=3)
        assert found.score[0] > 0.95
        before = probe(known.model, inputs, answers, "attention", folds=3)
        assert before.score[0] < 0.3
