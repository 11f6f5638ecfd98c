"""What a tokenizer says of tokens: special ones, delimiters, the ones it puts around a text."""

import string
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tokens", "is_delimiter"]

_CHARACTERS_PER_TOKEN = 16  # of a text that is cut before it is tokenised; doubled if too few


class Tokens:
    """A tokenizer, or None, with the model's config: one way to ask for the same things.

    tokenizer: as in transformers; or any object with `encode(text)` to ids and, for delimiters
    and labels, `decode(ids)` to text.
    """

    def __init__(self, tokenizer: Any | None, config: Any | None) -> None:
        self.tokenizer = tokenizer
        get_text = getattr(config, "get_text_config", None)
        self.config = config if get_text is None else get_text()

    def encode(self, text: str, at_most: int | None = None) -> list[int]:
        """Ids of a text without special tokens; `at_most` the first so many, for which only as
        much of a long text is tokenised as it takes."""
        if self.tokenizer is None:
            raise ValueError("text was given without a tokenizer: pass tokenizer=, or token ids")
        if at_most is None:
            return self._encode(text)
        length = at_most * _CHARACTERS_PER_TOKEN + 64
        while True:
            ids = self._encode(text[:length])
            # the last few tokens may differ where the text was cut
            if length >= len(text) or len(ids) >= at_most + 16:
                return ids[:at_most]
            length *= 2

    def _encode(self, text: str) -> list[int]:
        if callable(self.tokenizer):
            found = self.tokenizer(text, add_special_tokens=False, verbose=False)
            return list(found["input_ids"])
        return list(self.tokenizer.encode(text))  # type: ignore[union-attr]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after a text."""
        if not callable(self.tokenizer):
            return [], []
        plain = self._encode("a")
        full = list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return [], []

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of special tokens, by the tokenizer and by the model's config."""
        found = set(getattr(self.tokenizer, "all_special_ids", ()) or ())
        for name in ("bos", "eos", "pad", "cls", "sep", "mask", "unk", "decoder_start"):
            value = getattr(self.config, f"{name}_token_id", None)
            found |= {value} if isinstance(value, int) else set(value or ())
        return frozenset(found)

    def ordinary(self, vocabulary: int) -> Tensor:
        """Ids that stand for text, of a model with so many embeddings."""
        size = vocabulary
        if self.tokenizer is not None and hasattr(self.tokenizer, "__len__"):
            size = min(size, len(self.tokenizer))
        keep = torch.ones(size, dtype=torch.bool)
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        for unwanted in self.special | set(added):
            if 0 <= unwanted < size:
                keep[unwanted] = False
        return keep.nonzero()[:, 0]

    def texts(self, ids: Iterable[int]) -> list[str]:
        """Each id as text; the id itself as a number where it cannot be decoded."""
        decode = getattr(self.tokenizer, "decode", None)
        return [decode([i]) if decode is not None else str(i) for i in ids]

    def delimiters(self, ids: Tensor) -> Tensor | None:
        """True where an id is punctuation, a line end or special; None without a tokenizer."""
        if not hasattr(self.tokenizer, "decode"):
            return None
        unique, inverse = ids.unique(return_inverse=True)
        known = unique.tolist()
        marks = [
            i in self.special or is_delimiter(text)
            for i, text in zip(known, self.texts(known), strict=True)
        ]
        return torch.tensor(marks, device=ids.device)[inverse]


def is_delimiter(text: str) -> bool:
    """Whether a token is nothing but punctuation or line ends."""
    inside = text.strip()
    if not inside:
        return "\n" in text or "\r" in text
    return all(c in string.punctuation or unicodedata.category(c).startswith("P") for c in inside)
