"""GlobEnc's catalog entry: rows, targets, and the encoder that is planted."""

from __future__ import annotations

import torch

from headwise.models import view
from headwise.papers.lens.globenc import (
    HEADS,
    IDLE,
    OneToken,
    attributions,
    batch,
    encoder,
    spearman,
)
from headwise.train import fit
from tests.instruments import tiny


def test_rows_sum_to_one_and_targets_may_be_given() -> None:
    model, inputs = encoder(0).eval(), batch(5).inputs
    found = attributions(model, inputs)
    assert found.shape == (5, 16)
    torch.testing.assert_close(found.sum(1), torch.ones(5).double())
    # the answer is read from the class token whatever is asked
    torch.testing.assert_close(attributions(model, inputs, 2), found)
    bert = attributions(tiny.bert(), {"input_ids": tiny.ids(7, batch=2)}, torch.tensor([3, 4]))
    assert bert.shape == (2, 7)


def test_idle_heads_stay_idle_in_training() -> None:
    model = encoder(0, depth=1)
    fit(model, OneToken(), steps=10, size=8, rate=3e-3, seed=0)
    attention = view(model).attentions[0]
    for head in range(HEADS - IDLE, HEADS):
        assert not attention.value_weight()[head].any()
        assert not attention.output_weight()[head].any()
    assert attention.value_weight()[0].any()


def test_rank_correlation() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    b = torch.tensor([[2.0, 5.0, 7.0, 9.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 4.0, 3.0]])
    torch.testing.assert_close(spearman(a, b), torch.tensor([1.0, -1.0, 0.8]).double())
