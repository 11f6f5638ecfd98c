"""stories260K: a Llama of 260,032 parameters, 8 query and 4 key-value heads, on TinyStories.

Weights: karpathy/tinyllamas (MIT). It is small enough to know well: previous-token heads, no
sink, and no induction, since stories hardly ever repeat a sequence.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from headwise.models import AttentionReading, observe, view
from tests.proof.eager import CLOSE, ROW_STATISTICS, differences
from tests.proof.weights import stories

BEGIN = 1


@pytest.fixture(scope="module")
def model(assets):
    folder = assets / "stories260K" / "hf"
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def texts(assets) -> list[torch.Tensor]:
    return stories(assets)


def nats_per_token(model, texts) -> float:
    losses = [
        F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none") for ids in texts
    ]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def test_it_loses_as_many_nats_observed_as_unobserved(model, texts):
    before = nats_per_token(model, texts)
    seen = []
    with observe(view(model), read=lambda r: seen.append(r.attention.layer)):
        during = nats_per_token(model, texts)
    assert before == pytest.approx(1.2664, abs=2e-4)  # what is known of these weights
    assert during == pytest.approx(before, abs=2e-5)
    assert seen == [0, 1, 2, 3, 4] * len(texts)
    assert nats_per_token(model, texts) == before


def test_every_statistic_agrees_with_the_eager_matrices(model, texts):
    found = differences(model, {"input_ids": texts[3]})
    assert max(found.values()) < CLOSE, found


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_statistic_agrees_in_a_padded_batch(model, texts, side):
    a, b = texts[2], texts[0][:, :151]
    n = a.shape[1]
    padding = (n - b.shape[1], 0) if side == "left" else (0, n - b.shape[1])
    mask = F.pad(torch.ones_like(b), padding)
    inputs = {
        "input_ids": torch.cat([a, F.pad(b, padding)]),
        "attention_mask": torch.cat([torch.ones_like(a), mask]),
    }
    real = {"decoder": inputs["attention_mask"].bool()}
    # of padding rows at the left nothing is asked: they see nothing, and we give zeros there
    found = differences(model, inputs, real)
    assert max(found.values()) < CLOSE, found


def test_the_comparison_fails_for_the_wrong_heads(model, texts):
    found = differences(model, {"input_ids": texts[3]}, shift=1)
    for name in ROW_STATISTICS:
        assert found[name] > 0.05, f"{name} does not tell one head from the next"


def random_repeats(period: int = 60, samples: int = 8) -> torch.Tensor:
    """`(samples, 1 + 2 * period)`: the begin token and random tokens that stand twice."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(3, 512, (samples, period), generator=generator)
    return torch.cat([torch.full((samples, 1), BEGIN), once, once], 1)


@torch.no_grad()
def by_offset(model, ids: torch.Tensor, offset: int, rows: slice) -> torch.Tensor:
    """Mean weight on the key so far back `(layers, heads)`."""
    scores = []

    def read(reading: AttentionReading) -> None:
        index = torch.arange(ids.shape[1]) - offset
        scores.append(reading.map.mass_at(index.clamp_min(-1))[..., rows].mean((0, 2)))

    with observe(view(model), read=read):
        model(ids)
    return torch.stack(scores)


def test_heads_3_of_layer_1_and_6_of_layer_3_look_at_the_previous_token(model, texts):
    text = by_offset(model, texts[3], 1, slice(1, None))
    random = by_offset(model, random_repeats(), 1, slice(61, None))
    assert text.flatten().topk(2).indices.sort().values.tolist() == [1 * 8 + 3, 3 * 8 + 6]
    assert (text.flatten().topk(2).values > 0.55).all()
    assert (random.flatten()[[11, 30]] > 0.65).all()
    # the last layer and the first find words, not places
    assert random[0].max() < 0.1
    assert random[4].max() < 0.35


def test_it_has_no_induction_head(model):
    ids = random_repeats()
    assert by_offset(model, ids, 59, slice(61, None)).max() < 0.05
    assert by_offset(model, ids, 60, slice(61, None)).max() < 0.05


@torch.no_grad()
def test_it_has_no_sink(model, texts):
    first = []
    with observe(view(model), read=lambda r: first.append(r.map.received()[0, :, 0] / 424)):
        model(texts[3][:, :424])
    assert torch.stack(first).max() < 0.1
