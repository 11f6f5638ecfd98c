"""gpt-nano: a GPT-2 of 85,728 parameters that sorts six letters of {0, 1, 2}.

Weights: bbycroft/llm-viz (MIT). All it can be asked is 729 inputs, so that it is known in full.
"""

import itertools

import pytest
import torch

from headwise.models import AttentionReading, observe, view
from tests.proof.eager import CLOSE, differences
from tests.proof.weights import loader

LETTERS = 6


@pytest.fixture(scope="module")
def model(assets):
    load = loader(assets / "nanogpt_sort" / "load_nanogpt_sort.py").load
    return load(attn_implementation="sdpa")


@pytest.fixture(scope="module")
def questions() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(3), repeat=LETTERS)))


@torch.no_grad()
def sort(model, questions: torch.Tensor) -> torch.Tensor:
    ids = questions
    for _ in range(LETTERS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, LETTERS:]


def test_it_sorts_all_729_inputs_under_observation(model, questions):
    calls = []
    with observe(view(model), read=lambda r: calls.append(r.attention.layer)):
        answers = sort(model, questions)
    assert len(questions) == 729
    assert torch.equal(answers, questions.sort(1).values)
    assert calls == [0, 1, 2] * LETTERS


def test_every_statistic_agrees_with_the_eager_matrices(model, questions):
    whole = torch.cat([questions, questions.sort(1).values], 1)[:, :-1]
    found = differences(model, {"input_ids": whole[::3]})
    assert max(found.values()) < CLOSE, found


@torch.no_grad()
def test_when_it_answers_its_first_layer_looks_for_the_letters_that_come_next(model, questions):
    answers = questions.sort(1).values
    whole = torch.cat([questions, answers], 1)[:, :-1]
    wanted = torch.full_like(whole, -1)
    wanted[:, LETTERS - 1 :] = answers  # what stands next, at the rows that give the answers
    mass, even = [], []

    def read(reading: AttentionReading) -> None:
        answering = slice(LETTERS - 1, None)
        mass.append(reading.map.mass_matching(wanted, whole)[..., answering].mean((0, 2)))
        visible = (wanted[:, :, None] == whole[:, None]).tril()
        even.append((visible.sum(-1) / torch.arange(1, 12))[:, answering].mean())

    with observe(view(model), read=read):
        model(whole)
    assert mass[0].min() > even[0] + 0.15, (mass, even)
    assert mass[0].min() > torch.stack(mass[1:]).max() + 0.02, mass
