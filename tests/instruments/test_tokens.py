"""Tokenizers: what stands around a text, what is special, what is a delimiter, windows of text."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headwise.instruments.inputs import read_inputs
from headwise.instruments.positions import position_limit, position_table
from headwise.instruments.tokens import Tokens, is_delimiter
from tests.instruments import tiny


def tokenizer(around: str = "") -> Any:
    """Words and marks; `around` is a template such as "<s> $A </s>"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "</s>", "a", "b", "c", ".", ",", "\n", "word", "!?"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if around:
        made.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("around", "before", "after"),
    [("", [], []), ("<s> $A", [0], []), ("<s> $A </s>", [0], [1]), ("$A </s>", [], [1])],
)
def test_what_stands_around_a_text(around: str, before: list[int], after: list[int]) -> None:
    assert Tokens(tokenizer(around), None).around == (before, after)


def test_every_window_is_a_sample_as_the_tokenizer_makes_them() -> None:
    model = tiny.llama()
    words = Tokens(tokenizer("<s> $A </s>"), model.config)
    text = " ".join("abc"[i % 3] for i in range(25))
    (source,) = read_inputs(model, text, words, tokens=10, windows=None)
    rows = [sample.inputs["input_ids"][0].tolist() for sample in source.samples]
    assert [len(row) for row in rows] == [10, 10, 10]
    assert all(row[0] == 0 and row[-1] == 1 for row in rows)
    assert [i for row in rows for i in row[1:-1]] == words.encode(text)[:24]
    assert source.content == words.encode(text)
    assert source.entry["tokens"] == 30
    (source,) = read_inputs(model, text, words, tokens=10)
    assert len(source.samples) == 1


def test_a_long_text_is_tokenised_only_as_far_as_needed() -> None:
    seen: list[int] = []

    class Counting(tiny.Words):
        def encode(self, text: str) -> list[int]:
            seen.append(len(text))
            return super().encode(text)

    text = "abcd" * 50_000
    words = Tokens(Counting(), None)
    assert words.encode(text, 100) == words.encode(text)[:100]
    assert seen[0] < 2000
    assert words.encode("abc", 100) == words.encode("abc")

    class Long(tiny.Words):
        """One token for forty letters: more text is needed than was guessed."""

        def encode(self, text: str) -> list[int]:
            return [1] * (len(text) // 40)

    assert len(Tokens(Long(), None).encode(text, 300)) == 300


def test_special_and_ordinary_ids() -> None:
    words = Tokens(tokenizer(), tiny.llama(pad_token_id=5, eos_token_id=[1, 4]).config)
    assert words.special >= {0, 1, 4, 5}
    assert words.ordinary(60).tolist() == [2, 3, 6, 7, 8, 9]
    assert Tokens(None, None).ordinary(4).tolist() == [0, 1, 2, 3]


def test_delimiters() -> None:
    for text in (".", " ,", "\n", "\n\n", "!?", "...", "--", " “", "«", "]"):
        assert is_delimiter(text), text
    for text in ("a", " ", "", "\t", "a.", "3", "é", "\ufffd"):
        assert not is_delimiter(text), text
    words = Tokens(tokenizer(), None)
    found = words.delimiters(torch.tensor([[0, 2, 5, 6, 7, 8, 9, 2]]))
    assert found is not None
    assert found.tolist() == [[True, False, True, True, True, False, True, False]]
    assert Tokens(None, None).delimiters(torch.tensor([[0]])) is None


def test_positions() -> None:
    assert position_table(tiny.gpt2()) == 512
    assert position_table(tiny.llama()) is None
    assert position_limit(tiny.llama(max_position_embeddings=77)) == 77
    assert position_table(tiny.bart()) == 128
    assert position_limit(torch.nn.Linear(2, 2)) is None
