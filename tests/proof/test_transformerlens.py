"""The same models in TransformerLens 4: its attention patterns and head scores agree with ours.

It needs an environment of its own, see transformerlens/README.md beside this file. Native
models of TransformerLens share no line of code with transformers: their rotary embedding, grouped
heads and masks are other people's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

transformer_lens = pytest.importorskip(
    "transformer_lens", reason="TransformerLens is absent: see tests/proof/transformerlens"
)

from transformer_lens.head_detector import detect_head  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from headwise.instruments import see  # noqa: E402
from headwise.models import observe, view  # noqa: E402
from tests.proof.induction_gpt2 import as_gpt2  # noqa: E402
from tests.proof.lens import (  # noqa: E402
    RANDOM,
    VOCABULARY,
    bridge,
    llama,
    native_induction,
    native_llama,
)
from tests.proof.weights import loader  # noqa: E402

AGREES = 1e-4


@torch.no_grad()
def theirs(lens: Any, ids: Tensor) -> Tensor:
    """Patterns by TransformerLens `(layers, batch, heads, n, n)`."""
    _, cache = lens.run_with_cache(ids)
    return torch.stack([cache["pattern", layer] for layer in range(lens.cfg.n_layers)])


@torch.no_grad()
def ours(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of all maps `(layers, batch, heads, n, n)`, and their entropies."""
    rows: list[Tensor] = []
    entropy: list[Tensor] = []

    def read(reading: Any) -> None:
        rows.append(reading.map.rows(torch.arange(ids.shape[1])))
        entropy.append(reading.map.entropy())

    with observe(view(model), read=read):
        model(ids)
    return torch.stack(rows), torch.stack(entropy)


def check_patterns(model: Any, lens: Any, ids: Tensor) -> None:
    patterns = theirs(lens, ids)
    rows, entropy = ours(model, ids)
    assert rows.shape == patterns.shape
    worst = (rows - patterns).abs().max().item()
    expected = -torch.xlogy(patterns.double(), patterns.double()).sum(-1)
    off = (entropy - expected).abs().max().item()
    print(f"\nlargest difference: weights {worst:.1e}, entropies {off:.1e} nats")
    assert worst < AGREES
    assert off < AGREES
    assert (rows.roll(1, 2) - patterns).abs().max() > 0.3  # other heads would not agree


def random_ids(size: int, n: int, batch: int = 2) -> Tensor:
    """Behind the token 0, random ones that do not stand twice in a row."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(1, size - 1, (batch, n), generator=generator).cumsum(1)
    return torch.cat([torch.zeros(batch, 1, dtype=torch.long), 1 + steps % (size - 1)], 1)


@pytest.mark.parametrize("name", RANDOM)
def test_patterns_of_random_models_agree(name):
    model = RANDOM[name]()
    check_patterns(model, bridge(model), random_ids(VOCABULARY, 120))


def test_patterns_of_the_story_teller_agree(assets):
    model = LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()
    check_patterns(model, bridge(model), random_ids(512, 200))


def test_patterns_of_a_native_llama_agree():
    model = llama()
    check_patterns(model, native_llama(model), random_ids(VOCABULARY, 120))


def test_patterns_of_the_story_teller_as_a_native_model_agree(assets):
    model = LlamaForCausalLM.from_pretrained(assets / "stories260K" / "hf").eval()
    check_patterns(model, native_llama(model), random_ids(512, 200))


@pytest.mark.parametrize("name", ["clean", "trained"])
def test_patterns_of_native_induction_models_agree(assets, name):
    source = loader(assets / "induction_head_2l" / "load_induction.py")
    weights = source.load(name)
    lens = native_induction(weights)
    ids, _, places = source.batch(500)
    patterns = theirs(lens, ids)
    rows, _ = ours(as_gpt2(weights), ids)
    assert (rows - patterns).abs().max() < AGREES
    after_match = patterns[1, torch.arange(500), 0, -1, places].mean().item()
    assert after_match == pytest.approx({"clean": 0.915, "trained": 0.893}[name], abs=0.02)


# -- scores ------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "llama", "stories"])
def model(request) -> Any:
    if request.param in RANDOM:
        return RANDOM[request.param]()
    folder = request.getfixturevalue("assets") / "stories260K" / "hf"
    made = LlamaForCausalLM.from_pretrained(folder).eval()
    made.config.bos_token_id = made.config.eos_token_id = 0
    return made


def table(atlas: Any, column: str, model: Any) -> Tensor:
    layers = model.config.num_hidden_layers
    return torch.from_numpy(atlas.heads[column]).float().view(layers, -1)


def test_scores_on_a_text_agree_with_their_head_detector(model):
    """Their score is the share of all mass that lies where the pattern says, ours the mean of
    the rows' masses there: the same number. (They count attending to oneself as induction where
    a token stands twice in a row; here none does.)"""
    ids = random_ids(40, 100, batch=1)  # few words, so that they come again
    lens = bridge(model)
    text = " ".join(str(i) for i in ids[0, 1:].tolist())
    assert torch.equal(lens.to_tokens(text), ids)
    atlas = see(model, ids)
    for column, pattern in {
        "previous_mass": "previous_token_head",
        "same_token": "duplicate_token_head",
        "induction_text": "induction_head",
    }.items():
        expected = detect_head(lens, text, pattern)
        found = table(atlas, column, model)
        print(f"\n{column}: largest difference {(found - expected).abs().max():.1e}")
        assert expected.max() > 0.02
        assert (found - expected).abs().max() < AGREES, column


def test_scores_on_repeated_random_tokens_agree_with_their_formula(model):
    """TransformerLens' demos average a diagonal of the pattern on random tokens that stand twice:
    offset 1 - period for induction, -1 for the previous token, -period for the same token. Ours
    is the mean over the second time."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    atlas = see(model, random_ids(40, 100, batch=1), instruments=["repeats"])
    hook.remove()
    (repeated,) = seen
    period = repeated.shape[1] // 2
    start = repeated.shape[1] - 2 * period
    assert torch.equal(repeated[:, start : start + period], repeated[:, start + period :])
    patterns = theirs(bridge(model), repeated)
    for column, offset in {
        "induction_score": 1 - period,
        "previous_token_score": -1,
        "duplicate_token_score": -period,
    }.items():
        stripe = patterns.diagonal(offset, -2, -1)[..., -period:]
        expected = stripe.mean((1, -1))
        found = table(atlas, column, model)
        print(f"\n{column}: largest difference {(found - expected).abs().max():.1e}")
        assert (found - expected).abs().max() < AGREES, column


def test_the_induction_head_of_the_clean_model_is_found_by_both(assets):
    """Three letters that stand twice, the most that a context of eight letters holds twice."""
    source = loader(assets / "induction_head_2l" / "load_induction.py")
    weights = source.load("clean")
    model = as_gpt2(weights)
    atlas = see(model, torch.arange(8)[None], instruments=["repeats"])
    assert atlas.heads["previous_token_score"][0] > 0.99
    assert atlas.heads["induction_score"][1] > 5 * atlas.heads["induction_score"][0]
