"""Two-layer, one-head, attention-only models in which induction was trained, and a broken one.

Weights: JasonGross/guarantees-based-mechanistic-interpretability (MIT). Eight of 26 letters, the
last of which stood before: the model is to say what followed it then. Known of them is what each
layer does: layer 0 looks at the previous token, layer 1 at the token after the earlier place.
In the broken model the second layer no longer does, and it guesses.
"""

import pytest
import torch

from headwise.maps import AttentionMap, Causal
from headwise.models import AttentionReading, observe, view
from tests.proof.eager import CLOSE, differences
from tests.proof.induction_gpt2 import as_gpt2
from tests.proof.weights import loader

CHANCE = 1 / 26


@pytest.fixture(scope="module")
def source(assets):
    return loader(assets / "induction_head_2l" / "load_induction.py")


@pytest.fixture(scope="module")
def letters(source):
    """Letters `(2000, 8)`, what is to be said `(2000,)`, and where it stands `(2000,)`."""
    return source.batch()


@torch.no_grad()
def measured(maps: list[AttentionMap], places: torch.Tensor) -> tuple[float, float]:
    """Mean mass of layer 0 on the previous token, rows with one; of the last row of layer 1 on
    the token after the earlier place."""
    n = maps[0].scores.n_q
    previous = maps[0].mass_at(torch.arange(n) - 1)[..., 1:].mean().item()
    index = torch.full((len(places), n), -1)
    index[:, -1] = places
    return previous, maps[1].mass_at(index)[..., -1].mean().item()


@pytest.mark.parametrize(
    ("name", "induction"), [("clean", 0.915), ("trained", 0.893), ("broken", None)]
)
def test_maps_give_the_attention_known_of_these_weights(source, letters, name, induction):
    ids, answers, places = letters
    logits, matrices, qkv = source.forward(source.load(name), ids)
    maps = [AttentionMap(q, k, pattern=Causal()) for q, k, _ in qkv]
    for found, matrix in zip(maps, matrices, strict=True):
        assert (found.dense() - matrix).abs().max() < CLOSE
    previous, after_match = measured(maps, places)
    accuracy = (logits[:, -1].argmax(-1) == answers).float().mean().item()
    if name == "clean":
        assert previous > 0.9999
    if induction is None:  # the control: the test for induction must fail on it
        assert after_match == pytest.approx(1 / 8, abs=0.01)  # an even spread over eight letters
        assert accuracy < 2 * CHANCE
    else:
        assert after_match == pytest.approx(induction, abs=5e-3)
        assert accuracy > 0.85


@pytest.mark.parametrize("name", ["clean", "trained", "broken"])
def test_a_gpt2_of_these_weights_is_the_same_model_and_says_so_observed(source, letters, name):
    ids, _, places = letters
    weights = source.load(name)
    model = as_gpt2(weights, attn_implementation="sdpa")
    logits, _, qkv = source.forward(weights, ids)
    with torch.no_grad():
        assert (model(ids).logits - logits).abs().max() < 1e-3  # logits reach 50
    maps: list[AttentionMap] = []

    def read(reading: AttentionReading) -> None:
        q, k = reading.query.clone(), reading.key.clone()
        maps.append(AttentionMap(q, k, reading.map.scores.pattern, scale=reading.map.scores.scale))

    with observe(view(model), read=read), torch.no_grad():
        model(ids)
    direct = measured([AttentionMap(q, k, pattern=Causal()) for q, k, _ in qkv], places)
    assert measured(maps, places) == pytest.approx(direct, abs=1e-4)


def test_every_statistic_agrees_with_the_eager_matrices(source, letters):
    model = as_gpt2(source.load("trained"), attn_implementation="sdpa")
    found = differences(model, {"input_ids": letters[0][:500]})
    assert found.pop("output") < 1e-3
    assert max(found.values()) < CLOSE, found
