"""The embedded default: what is shipped does what its card says, and its recipe is what it says."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.models import default

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # recipes are no part of the package

from recipes.default_model import corpus, measure, mixture, train  # noqa: E402
from recipes.default_model.trigram import Trigram, discounts  # noqa: E402

TOKENS = 8192  # of held-out text


@pytest.fixture(scope="module")
def folder():
    return default.default_model_path()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def held_out(tokenizer):
    text, _ = default.default_text(100_000)
    return corpus.encode(tokenizer, [text])[:TOKENS]


def test_it_is_small_and_complete(folder):
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert set(files) == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) <= 8_000_000


def test_its_shape_is_worth_looking_at(model):
    config = model.config
    assert config.model_type == "llama"
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    assert config.num_hidden_layers >= 4
    assert config.num_attention_heads >= 8
    assert config.num_key_value_heads < config.num_attention_heads
    assert 16 <= config.head_dim <= 32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_tokenizer_begins_and_returns_the_text(tokenizer):
    text = "def naïve(x):\n\treturn '→' * x  # два\r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert set(tokenizer.all_special_ids) == set(range(mixture.FIRST_ORDINARY))


def test_loss_is_well_under_a_trigrams(model, tokenizer, held_out):
    rng = np.random.default_rng(0)
    names = [n for n in default.corpus_documents() if not default.is_held_out(n)]
    # a third of the training side, to be quick: 0.15 nats dearer than all of it, hence the margin
    sample = sorted(rng.permutation(names)[: len(names) // 3])
    trigram = Trigram(corpus.encode(tokenizer, map(default.read_document, sample)), len(tokenizer))
    rows = measure.windows(held_out, 512, tokenizer.bos_token_id)
    assert measure.text_loss(model, rows) < trigram.loss(held_out) - 0.45


def test_some_head_does_induction(model, tokenizer):
    rows = measure.repeated_rows(len(tokenizer), 64, 8, tokenizer.bos_token_id, seed=1)
    assert measure.induction(model, rows).max() > 0.4
    # and the model makes use of it
    second, first = measure.text_loss(model, rows, skip=65), measure.text_loss(model, rows[:, :65])
    assert second < first / 2


def test_some_head_looks_back_by_one_and_some_head_rests(model, tokenizer, held_out):
    rows = measure.windows(held_out, 256, tokenizer.bos_token_id)[:8]
    assert measure.previous_token(model, rows).max() > 0.4
    assert measure.sink(model, rows).max() > 0.5


def test_it_runs_far_beyond_its_training_length(model, tokenizer):
    long = torch.randint(3, len(tokenizer), (1, 8192), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode():
            logits = model(input_ids=long, logits_to_keep=1).logits
    finally:
        model.set_attn_implementation("eager")
    assert logits.isfinite().all()


def test_the_card_says_what_it_must(folder):
    card = (folder / "README.md").read_text()
    for word in ("## Data", "Python Software Foundation", "Apache-2.0", "recipes.default_model"):
        assert word in card
    for word in (
        "seed 0",
        "trigram",
        "minutes",
        "% of the tokens were in repeated rows",
        "Induction",
        "SHA-256",
    ):
        assert word in card
    assert "$" not in card


def test_head_scores_on_matrices_made_by_hand():
    """The scores of a head that does exactly the thing are one."""
    span, n = 5, 11
    query = torch.arange(n)
    keys = {
        "induction": (query - span + 1).clamp(min=0),
        "previous_token": (query - 1).clamp(min=0),
        "sink": torch.zeros_like(query),
    }
    weights = torch.stack([torch.eye(n)[keys[name]] for name in keys])  # (heads, n, n)

    class Hand:
        def __call__(self, input_ids, output_attentions):
            full = weights.expand(len(input_ids), -1, -1, -1)
            return type("Output", (), {"attentions": (full,)})

    rows = measure.repeated_rows(100, span, 2, 0, seed=0)
    assert torch.equal(rows[:, 1 : span + 1], rows[:, span + 1 :])
    for place, score in enumerate((measure.induction, measure.previous_token, measure.sink)):
        scores = score(Hand(), rows)[0]
        assert scores[place] == 1
        assert scores.argmax() == place


def test_default_text_is_held_out_deterministic_and_named():
    text, name = default.default_text(5000)
    assert len(text) == 5000
    assert "held-out" in name
    assert default.default_text(5000) == (text, name)
    assert default.default_text(20_000)[0].startswith(text)
    first = default.held_out_documents()[0]
    assert text.startswith(default.read_document(first).strip()[:500])


@pytest.mark.parametrize("characters", [0, -1, 10**9])
def test_default_text_refuses_what_it_cannot_give(characters):
    with pytest.raises(ValueError, match="characters"):
        default.default_text(characters)


def test_the_split_goes_by_name_alone():
    documents = default.corpus_documents()
    held_out = set(default.held_out_documents())
    assert held_out == {name for name in documents if default.is_held_out(name)}
    assert 0.03 < len(held_out) / len(documents) < 0.16
    # fixed for ever: the shipped model was trained on one side of it
    assert default.is_held_out("posixpath.py")
    assert not default.is_held_out("argparse.py")
    assert not any(name.startswith(("test/", "site-packages/", "idlelib/")) for name in documents)


def test_the_default_can_be_asked_for_without_torch():
    code = (
        "import runpy, sys; default = runpy.run_path(sys.argv[1]); default['default_model_path']();"
        "default['default_text'](10); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, default.__file__], check=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 20), st.integers(3, 300), st.integers(0, 2**31))
def test_trigram_distributions_sum_to_one(vocabulary, length, seed):
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, vocabulary - 1, length)  # the last token is never seen
    trigram = Trigram(stream, vocabulary)
    before, last, token = np.meshgrid(*[np.arange(vocabulary)] * 3, indexing="ij")
    probability = trigram.probability(before, last, token)
    assert (probability > 0).all()
    np.testing.assert_allclose(probability.sum(-1), 1, atol=1e-12)


def test_trigram_agrees_with_the_formula_written_out():
    """Equation 27, term by term in dictionaries, on a stream long enough to estimate discounts."""
    rng = np.random.default_rng(3)
    stream = rng.choice(12, 4000, p=(w := 1 / np.arange(1, 13)) / w.sum()).tolist()
    grams = [tuple(stream[i : i + 3]) for i in range(len(stream) - 2)]

    def smoothed(counts, lower):
        give = discounts(np.array(list(counts.values())))

        def p(*gram):
            *context, _ = gram
            mine = {g: c for g, c in counts.items() if list(g[:-1]) == context}
            if not mine:
                return lower(*gram[1:])
            total, kept = sum(mine.values()), mine.get(gram, 0)
            left = sum(give[min(c, 3)] for c in mine.values()) / total
            return (kept - give[min(kept, 3)]) / total + left * lower(*gram[1:])

        return p

    three = {g: grams.count(g) for g in set(grams)}
    two = {g: sum(t[1:] == g for t in three) for g in {t[1:] for t in three}}
    one = {g: sum(t[1:] == g for t in two) for g in {t[1:] for t in two}}
    p = smoothed(three, smoothed(two, smoothed(one, lambda *_: 1 / 12)))
    trigram = Trigram(np.array(stream), 12)
    for gram in [*grams[:5], (11, 11, 0), (0, 11, 11), (10, 9, 11)]:
        assert math.isclose(trigram.probability(*np.array(gram)[:, None])[0], p(*gram))


def test_the_repeated_share_is_what_the_card_says():
    stream = np.random.default_rng(0).integers(3, 50, 10_000)
    unigram = np.bincount(stream, minlength=60) / len(stream)
    tokens = {True: 0, False: 0}
    steps = mixture.DRILL.stop + 5 * len(mixture.LENGTHS)
    for step in range(steps):
        batch = mixture.batch(stream, unigram, step, seed=0)
        assert (batch.tokens[:, 0] == 0).all()
        assert (batch.targets[~batch.repeated] != mixture.IGNORED).all()
        assert batch.repeated.all() == (step in mixture.DRILL)
        for kind in tokens:
            tokens[kind] += batch.tokens[batch.repeated == kind].numel()
    repeated, seen = mixture.tokens_seen(steps)
    assert sum(tokens.values()) == pytest.approx(seen, rel=0.02)  # 2048 does not divide 5120
    assert tokens[True] / sum(tokens.values()) == pytest.approx(repeated / seen, abs=0.002)


@given(st.integers(1, 100), st.integers(0, 10**6))
def test_one_row_in_five_is_repeated_for_any_number_of_rows(rows, turn):
    five = [mixture.is_repeated(rows, turn + t).sum() for t in range(5)]
    assert sum(five) == rows


@settings(deadline=None, max_examples=50)
@given(st.integers(16, 300), st.integers(0, 2**31))
def test_what_counts_in_a_repeated_row_can_be_known(length, seed):
    unigram = np.full(1000, 1e-3)
    row, known = mixture.repeated_span(length, unigram, np.random.default_rng(seed))
    assert row.shape == (length,)
    assert row.min() >= mixture.FIRST_ORDINARY
    spans = range(8, min(length // 2 + 1, known))
    fits = [s for s in spans if (row[known - 1 :] == row[known - 1 - s : length - s]).all()]
    assert fits
    assert known <= length


def test_batches_depend_on_seed_and_step_alone():
    stream = np.arange(3, 5000)
    unigram = np.full(5000, 1 / 5000)
    again = [mixture.batch(stream, unigram, 7, seed=1) for _ in range(2)]
    assert torch.equal(again[0].tokens, again[1].tokens)
    other = mixture.batch(stream, unigram, 7, seed=2)
    assert again[0].tokens.shape != other.tokens.shape or (again[0].tokens != other.tokens).any()


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    stream = np.random.default_rng(0).integers(3, 100, 20_000).astype(np.uint16)
    monkeypatch.setattr(corpus, "load", lambda work: corpus.Corpus(stream, stream, {}))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    monkeypatch.setattr(train, "CONFIG", train.CONFIG | small | {"vocab_size": 100})
    monkeypatch.setattr(corpus, "VOCABULARY", 100)
    monkeypatch.setattr(mixture, "TOKENS_PER_STEP", 640)
    monkeypatch.setattr(mixture, "LENGTHS", (64, 128))
    monkeypatch.setattr(mixture, "DRILL", range(1, 3))

    def weights(name, *stops):
        for stop in stops:
            train.train(tmp_path / name, 6, seed=0, peak=1e-2, autocast=False, stop=stop)
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]

    straight, resumed = weights("straight", 6), weights("resumed", 2, 6)
    for name, expected in straight.items():
        torch.testing.assert_close(resumed[name], expected)
    assert not list(tmp_path.glob("*/*.part"))
