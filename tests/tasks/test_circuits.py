"""What is said of the circuits is true: found by taking everything away, one piece at a time, with
plain matrices and none of the instruments."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.tasks import circuits
from headwise.tasks.circuits import KnownCircuit
from headwise.tasks.task import IGNORED, Batch
from tests.tasks.by_hand import all_edges, by_hand

NAMES = [(name, control) for name in circuits.ALL for control in (False, True)]
CHANGED, IDLE = 0.05, 1e-5
"""Nats that taking away what matters costs at least, and what does not at most."""


@cache
def made(name: str, control: bool = False) -> KnownCircuit:
    known: KnownCircuit = circuits.ALL[name]()
    if not control:
        return known
    assert known.control is not None
    return known.control()


every = pytest.mark.parametrize(
    ("name", "control"), NAMES, ids=[f"{n}{'-control' * c}" for n, c in NAMES]
)


@torch.no_grad()
def measured(known: KnownCircuit, batch: Batch) -> dict[str, float]:
    found = known.task.measure(known.model(**batch.inputs), batch)
    return {name: total / count for name, (total, count) in found.items()}


@contextmanager
def zeroed(weight: Tensor) -> Iterator[None]:
    """Some weights are zero for a while."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        yield
        weight.copy_(kept)


def output_of(known: KnownCircuit, layer: int, head: int) -> Tensor:
    module: Any = known.model.stack.mixers[layer]  # type: ignore[union-attr, index]
    width = module.merge.linear.weight.shape[1] // module.size.heads
    return module.merge.linear.weight.data[:, head * width : (head + 1) * width]


def all_heads(known: KnownCircuit) -> list[tuple[int, int]]:
    mixers: Any = known.model.stack.mixers  # type: ignore[union-attr]
    return [(layer, head) for layer, m in enumerate(mixers) for head in range(m.size.heads)]


@every
def test_it_solves_its_task(name: str, control: bool) -> None:
    known = made(name, control)
    batch = known.batch(300)
    found = measured(known, batch)
    assert found["accuracy"] == known.accuracy == 1.0
    assert found["loss"] < 0.01
    with torch.no_grad():
        output = known.model(**batch.inputs)
    asked = batch.targets != IGNORED
    logits, targets = output[asked], batch.targets[asked]
    right = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1, keepdim=True)
    assert (right - others).min() > 5  # logits


@every
def test_exactly_its_heads_matter(name: str, control: bool) -> None:
    known, batch = made(name, control), made(name, control).batch(100)
    whole = measured(known, batch)["loss"]
    for layer, head in all_heads(known):
        with zeroed(output_of(known, layer, head)):
            cost = measured(known, batch)["loss"] - whole
        if (layer, head) in known.heads:
            assert cost > CHANGED
        else:
            assert abs(cost) < IDLE
            assert (layer, head) in known.decoys


@every
def test_exactly_its_feeds_matter(name: str, control: bool) -> None:
    known, batch = made(name, control), made(name, control).batch(100)
    whole = measured(known, batch)["loss"]
    model: Any = known.model
    for layer, fed in enumerate(model.stack.fed):
        if not fed:
            assert layer not in known.feeds
            continue
        with zeroed(model.stack.feeds[layer].down.weight.data):
            cost = measured(known, batch)["loss"] - whole
        assert cost > CHANGED if layer in known.feeds else abs(cost) < IDLE


@every
def test_exactly_its_edges_matter(name: str, control: bool) -> None:
    known = made(name, control)
    batch = known.batch(32)
    if "attention_mask" in batch.inputs:  # the answer stands before the padding, which nobody sees
        batch.inputs.pop("attention_mask")
    with torch.no_grad():
        torch.testing.assert_close(
            known.model(**batch.inputs).double(), by_hand(known, batch.inputs), atol=2e-2, rtol=1e-4
        )
    whole = float(known.task.loss(by_hand(known, batch.inputs), batch))
    there = all_edges(known)
    assert known.edges <= set(there)
    for edge in there:
        cost = float(known.task.loss(by_hand(known, batch.inputs, edge), batch)) - whole
        assert cost > CHANGED if edge in known.edges else abs(cost) < IDLE, (edge, cost)


@every
def test_the_contrast_turns_the_answer_around(name: str, control: bool) -> None:
    known = made(name, control)
    pair = known.contrast(20, 1)
    for inputs, sign in ((pair.clean, 1), (pair.corrupted, -1)):
        with torch.no_grad():
            logits = known.model(**inputs)
        rows = logits if logits.dim() == 2 else logits[:, pair.at]
        found = rows.gather(1, pair.right[:, None]) - rows.gather(1, pair.wrong[:, None])
        assert (sign * found > 5).all()
    again = known.contrast(20, 1)
    for key, value in pair.clean.items():
        assert torch.equal(value, again.clean[key])
        assert value.shape == pair.corrupted[key].shape
        assert len(value) == len(pair.right) == len(pair.wrong) == 20
        assert not torch.equal(value, pair.corrupted[key])


@pytest.mark.parametrize("name", circuits.ALL)
def test_the_control_does_it_another_way(name: str) -> None:
    known, control = made(name), made(name, True)
    assert control.control is None
    assert not known.heads & control.heads
    assert all_heads(known) == all_heads(control)
    a, b = known.batch(5), control.batch(5)  # the same problems
    assert all(torch.equal(value, b.inputs[key]) for key, value in a.inputs.items())


@every
def test_the_loudest_heads_are_decoys(name: str, control: bool) -> None:
    """By the weights, the heads that write most are none of the circuit."""
    known = made(name, control)
    sizes = {}
    for layer, head in all_heads(known):
        module: Any = known.model.stack.mixers[layer]  # type: ignore[union-attr, index]
        width = module.size.value_dim
        value = module.project.value.weight[head * width : (head + 1) * width]
        sizes[layer, head] = float((output_of(known, layer, head) @ value).detach().norm())
    loudest = sorted(sizes, key=lambda head: -sizes[head])[: len(known.heads)]
    assert not known.heads & set(loudest)


def spectrum(table: Tensor) -> Tensor:
    """Share of the power of each frequency 1 .. p // 2, `table` `(p, ...)` over numbers."""
    power = torch.fft.rfft(table.double(), dim=0).abs().square().flatten(1).sum(1)[1:]
    return power / power.sum()


def test_waves_are_in_the_circuit_and_not_in_the_table() -> None:
    known, table = made("modular_fourier"), made("modular_fourier", True)
    p, chosen = known.task.p, known.facts["frequencies"]  # type: ignore[attr-defined]
    assert isinstance(chosen, tuple)
    assert len(chosen) == 3
    keys = torch.tensor(chosen) - 1
    a = torch.arange(p)
    ids = torch.stack([a, torch.full_like(a, p), torch.full_like(a, 3), torch.full_like(a, p + 1)])
    for model, whole in ((known.model, True), (table.model, False)):
        embedding: Any = model.embed
        with torch.no_grad():
            logits = model(ids.T)[:, -1, :p]
        for found in (spectrum(embedding.weight[:p].detach()), spectrum(logits)):
            if whole:
                assert found[keys].sum() > 0.999
            else:
                assert found.max() < 1.5 / (p // 2)


def test_every_sum_of_small_numbers() -> None:
    """Two digits, all 10 000 problems."""
    for known in (circuits.addition(2), circuits.addition(2).control()):  # type: ignore[misc]
        a, b = torch.arange(100).repeat_interleave(100), torch.arange(100).repeat(100)
        c = a + b
        line = torch.stack(
            [a // 10, a % 10, 0 * a + 10, b // 10, b % 10, 0 * a + 11, c // 100, c // 10 % 10], 1
        )
        with torch.no_grad():
            said = known.model(line)[:, 5:].argmax(-1)
        assert torch.equal(said, torch.stack([c // 100, c // 10 % 10, c % 10], 1))


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        circuits.modular_fourier(10)
    with pytest.raises(ValueError, match="side"):
        circuits.class_token(1)
