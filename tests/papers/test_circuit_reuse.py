"""Circuit reuse: what its claims do not say of its tasks and its change."""

import pytest
import torch

from headwise.edits import swap
from headwise.models import observe, view
from headwise.models.backbones import Decoder
from headwise.papers.lens.circuit_reuse import (
    ASK,
    COPY,
    FILLERS,
    KINDS,
    LENGTH,
    LeaveOut,
    LookAt,
    drawn,
    pairs,
    reuse,
    unnamed,
)
from headwise.parts import Attention, Rotary
from headwise.tasks.task import IGNORED


def small() -> Decoder:
    torch.manual_seed(0)
    mixer = lambda layer: Attention(16, 2, position=Rotary(), causal=True)  # noqa: E731
    return Decoder(COPY + 1, 16, 2, mixer=mixer).eval()


@pytest.mark.parametrize("kind", ["people", "colours"])
def test_one_name_stands_once_and_the_other_twice(kind):
    line, right, wrong, again = drawn(kind, 200, torch.Generator().manual_seed(1))
    assert line.shape == (200, LENGTH + 1)
    assert ((line == right[:, None]).sum(1) == 1).all()
    assert ((line == wrong[:, None]).sum(1) == 2).all()
    assert (line[torch.arange(200), again] == wrong).all()
    before = torch.arange(LENGTH + 1) < again[:, None]
    assert ((line == wrong[:, None]) & before).any(1).all()
    low = KINDS if kind == "colours" else 0
    assert ((right >= low) & (right < low + KINDS)).all()
    assert (line[:, -1] == ASK).all()
    # the name that stands once may come last, so that the second time does not give it away
    assert ((line == right[:, None]).long().argmax(1) > again).float().mean() > 0.2


@pytest.mark.parametrize("kind", ["people", "colours", "copying"])
def test_in_corrupted_pairs_the_other_answer_is_right(kind):
    clean, other, metric = pairs(kind, 100)
    assert ((clean != other).sum(1) == 1).all()
    if kind == "copying":
        assert (clean[:, -2] == metric.right).all()
        assert (other[:, -2] == metric.wrong).all()
    else:
        assert ((other == metric.right[:, None]).sum(1) == 2).all()
        assert ((other == metric.wrong[:, None]).sum(1) == 1).all()


def test_where_no_colour_stands_twice_nothing_tells_which_is_right():
    line, right, wrong_at = unnamed(100)
    wrong = line[torch.arange(100), wrong_at]
    for name in (right, wrong):
        assert ((line == name[:, None]).sum(1) == 1).all()
    assert (line[:, :-1] < 2 * KINDS + FILLERS).all()


def test_the_task_asks_at_the_end_only():
    batch = LeaveOut().batch(0, 40)
    assert (batch.targets[:, :-1] == IGNORED).all()
    ends = batch.inputs["input_ids"][:, -1]
    assert (ends == COPY).sum() == 5
    assert (ends == ASK).sum() == 35


def test_looking_at_one_token_is_the_last_query_of_those_heads_alone():
    model, ids = small(), pairs("people", 4)[0]
    tokens = torch.tensor([0, 3, 5, 2])
    rows: dict[int, torch.Tensor] = {}

    def read(seen):
        rows[seen.attention.layer] = seen.map.rows(torch.arange(LENGTH + 1))

    with observe(view(model), read), torch.no_grad():
        model(ids)
    before = dict(rows)
    with swap(model, {((0, 1),): LookAt(tokens)}), observe(view(model), read), torch.no_grad():
        model(ids)
    assert torch.allclose(rows[0][:, 0], before[0][:, 0], atol=1e-5)
    assert torch.allclose(rows[0][:, 1, :-1], before[0][:, 1, :-1], atol=1e-5)
    last = rows[0][:, 1, -1]
    assert torch.allclose(last, torch.nn.functional.one_hot(tokens, LENGTH + 1).float(), atol=1e-6)


def test_circuits_of_a_task_with_itself_are_the_same():
    one, other = reuse(small(), pairs("people", 8), pairs("people", 8), threshold=0.3)
    assert one.heads == other.heads
    assert one.overlap(other) == 1 or not one.heads
