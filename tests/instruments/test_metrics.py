"""Metrics of causes against plain loops, and what they refuse."""

import math

import pytest
import torch
from torch import Tensor

from headwise.instruments.metrics import LogitDifference, Loss, metric_of, rows_at


def logits(batch: int = 3, n: int = 6, vocabulary: int = 11) -> Tensor:
    return torch.randn(batch, n, vocabulary, generator=torch.Generator().manual_seed(0))


def ids(batch: int = 3, n: int = 6, vocabulary: int = 11) -> Tensor:
    return torch.randint(vocabulary, (batch, n), generator=torch.Generator().manual_seed(1))


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("mask", [None, MASK])
def test_loss_and_accuracy_are_means_over_predicted_real_tokens(mask: Tensor | None) -> None:
    rows, tokens = logits(), ids()
    inputs = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    loss, hits = metric_of("loss").score(rows, inputs), metric_of("accuracy").score(rows, inputs)
    for b in range(3):
        losses, right = [], []
        for i in range(5):
            if mask is not None and not mask[b, i + 1]:
                continue
            target = int(tokens[b, i + 1])
            total = sum(math.exp(float(x)) for x in rows[b, i])
            losses.append(math.log(total) - float(rows[b, i, target]))
            right.append(float(int(rows[b, i].argmax()) == target))
        assert float(loss[b]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert float(hits[b]) == pytest.approx(sum(right) / len(right))


def test_labels_win_over_the_next_token_and_may_be_ignored() -> None:
    rows, labels = logits(), ids()
    labels[:, :4] = -100
    found = Loss().score(rows, {"input_ids": ids(), "labels": labels})
    for b in range(3):
        each = [-rows[b, i].log_softmax(-1)[labels[b, i + 1]] for i in (3, 4)]
        assert float(found[b]) == pytest.approx(float(sum(each)) / 2, abs=1e-5)


def test_classes_have_one_answer_an_example() -> None:
    rows, labels = logits()[:, 0], torch.tensor([1, 5, 2])
    found = Loss().score(rows, {"pixel_values": torch.zeros(3, 1), "labels": labels})
    expected = -rows.log_softmax(-1)[torch.arange(3), labels]
    assert torch.allclose(found, expected)
    with pytest.raises(ValueError, match="class as labels"):
        Loss().score(rows, {"pixel_values": torch.zeros(3, 1)})


def test_divergence_is_zero_from_itself_and_leaves_padding_out() -> None:
    rows, metric = logits(), metric_of("kl")
    assert metric.needs_clean
    assert torch.allclose(metric.score(rows, {}, rows), torch.zeros(3), atol=1e-6)
    other = rows + 0.3 * logits().flip(-1)
    found = metric.score(other, {"attention_mask": MASK}, rows)
    for b in range(3):
        p, q = rows[b].softmax(-1), other[b].softmax(-1)
        each = [(p[i] * (p[i] / q[i]).log()).sum() for i in range(6) if MASK[b, i]]
        assert float(found[b]) == pytest.approx(float(sum(each)) / len(each), abs=1e-5)
    with pytest.raises(ValueError, match="give its logits as clean"):
        metric.score(rows, {})


def test_logit_differences_are_read_at_the_last_real_token() -> None:
    rows = logits()
    right, wrong = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    metric = LogitDifference(right, wrong)
    found = metric.score(rows, {"attention_mask": MASK})
    for b, at in enumerate((5, 5, 2)):
        assert float(found[b]) == float(rows[b, at, right[b]] - rows[b, at, wrong[b]])
    second = LogitDifference(1, 4, at=torch.tensor([0, -2, 1])).score(rows, {})
    for b, at in enumerate((0, 4, 1)):
        assert float(second[b]) == float(rows[b, at, 1] - rows[b, at, 4])
    assert torch.equal(metric.of(slice(1, 3)).score(rows[1:], {}), metric.score(rows, {})[1:])
    twice = metric.score(torch.cat([rows, rows]), {})  # copies of the same examples
    assert torch.equal(twice, metric.score(rows, {}).repeat(2))


def test_several_answers_are_averaged() -> None:
    rows = logits()
    some = LogitDifference(torch.tensor([[1, 2]] * 3), 0).score(rows, {})
    assert torch.allclose(some, rows[:, -1, 1:3].mean(-1) - rows[:, -1, 0])


def test_what_does_not_fit_is_refused() -> None:
    rows = logits()
    with pytest.raises(ValueError, match="answers for 2 examples, there are 3"):
        LogitDifference(torch.tensor([1, 2]), 0).score(rows, {})
    with pytest.raises(ValueError, match="outside of the 6 tokens"):
        LogitDifference(1, 2, at=6).score(rows, {})
    with pytest.raises(ValueError, match="no metric 'lost'; there are loss, accuracy, kl"):
        metric_of("lost")
    with pytest.raises(TypeError, match="is no metric"):
        metric_of(3)
    with pytest.raises(ValueError, match=r"gave \(\) for 3 examples"):
        metric_of(lambda logits, inputs: logits.sum()).score(rows, {})
    with pytest.raises(ValueError, match="2 tokens or more"):
        Loss().score(rows[:, :1], {"input_ids": ids()[:, :1]})


def test_gradients_pass_through_all_but_accuracy() -> None:
    for metric in ("loss", "kl", LogitDifference(1, 2)):
        rows = logits().requires_grad_()
        score = metric_of(metric).score(rows, {"input_ids": ids()}, logits().flip(-1))
        score.sum().backward()
        assert rows.grad is not None
        assert rows.grad.abs().sum() > 0


def test_last_token_of_an_encoder_decoder_is_the_decoders() -> None:
    logits = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    inputs = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 5),
        "decoder_input_ids": torch.zeros(2, 3, dtype=torch.long),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    assert torch.equal(rows_at(logits, inputs, -1), logits[[0, 1], [2, 1]])
    del inputs["decoder_attention_mask"]
    assert torch.equal(rows_at(logits, inputs, -1), logits[:, 2])
