# ruff: noqa: F401, F811 -- fixtures of the other file
"""Facts exchanged in SmolLM2-135M-Instruct (where its weights are: see test_smollm2.py).

Prompts are of the known-facts set of ROME's authors, of those that this model answers rightly.
"""

import json

import pytest
import torch

from headwise.edits import collect_key_statistics, edit_fact, measure_edit
from headwise.models import view
from tests.proof.test_smollm2 import model, text, tokenizer, weights

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'headwise[gguf]'")

LAYER = 8
EDITS = {"Danish pastry": "Japan", "Shah Alam II": "Buddhism"}
NEIGHBOURS = ("Trento", "Muawiyah I", "Royal National Theatre", "Gus Poyet", "Edward Teller",
              "Simcoe Composite School", "Ibn Khaldun", "Madame de Montesson")  # fmt: skip
PREFIXES = ("I read it twice.", "The report was long, and it rained.")


@pytest.fixture(scope="module")
def prompts(assets) -> dict[str, str]:
    known = json.loads((assets / "prompts" / "known_1000.json").read_text())
    return {one["subject"]: one["prompt"] for one in known}


@pytest.fixture(scope="module")
def statistics(model, tokenizer, assets):
    whole = (assets / "text" / "wikitext2_test.txt").read_text()[200_000:240_000]
    return collect_key_statistics(view(model), whole, LAYER, tokenizer, most=6_000)


@pytest.fixture(scope="module")
def edited(model, tokenizer, prompts, text, statistics):
    """Measured effects by (subject, whether C is known)."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    for subject, known in [*((one, True) for one in EDITS), (next(iter(EDITS)), False)]:
        patch = edit_fact(
            model,
            prompts[subject],
            subject,
            EDITS[subject],
            tokenizer=tokenizer,
            layers=LAYER,
            statistics=statistics if known else "identity",
            prefixes=PREFIXES,
        )
        neighbours = [prompts[one] for one in NEIGHBOURS]
        found[subject, known] = measure_edit(
            patch, tokenizer, neighbours=neighbours, text=text, most=1_024
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


@pytest.mark.parametrize("subject", list(EDITS))
def test_a_fact_is_exchanged_and_little_else(edited, subject):
    found = edited[subject, True]
    assert found.efficacy.right_before == 0
    assert found.efficacy.right_after == 1
    assert found.efficacy.probability_after > 0.5
    assert found.neighbours.same >= 0.75
    assert abs(found.loss.change) < 0.02


def test_without_the_statistics_more_is_disturbed(edited):
    subject = next(iter(EDITS))
    known, blind = edited[subject, True], edited[subject, False]
    assert blind.neighbours.divergence > 2 * known.neighbours.divergence
    assert blind.loss.change > 2 * abs(known.loss.change)
