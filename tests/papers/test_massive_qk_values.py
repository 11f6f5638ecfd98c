"""Disrupting features against plain loops, and as a change that leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

import headwise
from headwise.papers.lens.massive_qk_values import ContextAndFacts, Disrupt, massive, norms
from tests.instruments import tiny


def test_the_strongest_feature_becomes_its_mean() -> None:
    x = torch.randn(2, 3, 7, 5)
    found = Disrupt(2)._set(x)
    for b in range(2):
        for h in range(3):
            sizes = [float(sum(v**2 for v in x[b, h, :, d].tolist())) for d in range(5)]
            best = sorted(range(5), key=lambda d: -sizes[d])[:2]
            for d in range(5):
                if d in best:
                    assert torch.allclose(found[b, h, :, d], x[b, h, :, d].mean().expand(7))
                else:
                    assert torch.equal(found[b, h, :, d], x[b, h, :, d])


def test_others_are_others() -> None:
    x = torch.randn(2, 3, 7, 5)
    changed = (Disrupt(2, others=0)._set(x) != x).any(-2)
    assert (changed.sum(-1) == 2).all()
    assert not (
        changed & torch.zeros_like(changed).scatter(-1, norms(x).topk(2).indices, True)
    ).any()


def test_nothing_is_massive_in_noise() -> None:
    assert not massive(torch.randn(4, 100, 64)).any()


def test_it_works_on_models_as_they_come_and_is_undone() -> None:
    model, ids = tiny.llama(), tiny.ids(9)
    with torch.no_grad():
        plain = model(ids).logits
        with headwise.swap(model, {"all": Disrupt(1)}):
            changed = model(ids).logits
        assert (changed - plain).abs().max() > 1e-2
        torch.testing.assert_close(model(ids).logits, plain)


def test_facts_and_context_of_the_task() -> None:
    task = ContextAndFacts()
    batch = task.batch(0, 8)
    ids, targets = batch.inputs["input_ids"], batch.targets
    assert ids.shape == targets.shape == (8, 23)
    assert (ids[:4] < 32).all()
    for line, asked in zip(ids[4:].tolist(), targets[4:].tolist(), strict=True):
        for token, answer in zip(line, asked, strict=True):
            assert answer == (int(task.table[token - 32]) if token >= 32 else -100)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Disrupt(0)
