import pytest
import torch

from headwise.compress import HeadCache, SinksAndWindow
from headwise.compress.search.retrieval import retrieval
from headwise.models.default import default_model_path
from tests.instruments.tiny import llama


@pytest.fixture(scope="module")
def default_model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model_path()).eval()


def test_a_model_that_repeats_recalls_and_one_that_forgot_does_not(
    default_model: torch.nn.Module,
) -> None:
    asked = {"lengths": (96,), "depths": (0.25, 0.5), "trials": 4}
    whole = retrieval(default_model, **asked)
    kept = retrieval(default_model, cache=lambda m: HeadCache(m, budget=1.0), **asked)
    gone = retrieval(
        default_model,
        cache=lambda m: HeadCache(m, 8, SinksAndWindow(), sinks=1, window=8, step=1, slack=1),
        **asked,
    )
    assert whole.rows == kept.rows
    assert whole.tokens > 0.8
    assert gone.tokens < 0.3
    assert [row[:2] for row in whole.rows] == [(96, 0.25), (96, 0.5)]


def test_an_untrained_model_recalls_nothing() -> None:
    assert retrieval(llama(), lengths=(48,), trials=4).tokens < 0.2


@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_questions_in_words_have_the_length_that_is_asked_for(
    kind: str, default_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    lengths, texts = [], []

    def answers(model: object, prompt: torch.Tensor, answer: torch.Tensor, cache: object) -> object:
        lengths.append(len(prompt))
        texts.append((tokenizer.decode(prompt), tokenizer.decode(answer)))
        return torch.tensor([True, False])

    monkeypatch.setattr("headwise.compress.search.retrieval._right", answers)
    found = retrieval(default_model, tokenizer, kind, lengths=(120, 200), depths=(0, 1), trials=2)
    assert lengths == [120] * 4 + [200] * 4
    assert all(answer.strip() in text for text, answer in texts)
    assert (found.tokens, found.answers) == (0.5, 0.0)


def test_what_cannot_be_asked_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="expected one of passkey"):
        retrieval(model, kind="haystack")
    with pytest.raises(ValueError, match="tokenizer="):
        retrieval(model, kind="passkey")
    with pytest.raises(ValueError, match="24 tokens"):
        retrieval(model, lengths=(12,))
    with pytest.raises(ValueError, match="depths"):
        retrieval(model, depths=(2.0,))
