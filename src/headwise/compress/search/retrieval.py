"""Whether a model, or a model with a smaller cache, still finds one thing in a long text.

    passkey   five digits somewhere in a monotonous text (Mohtashami and Jaggi 2023, arXiv
              2305.16300, section 4.2)
    needle    a sentence that has nothing to do with the text around it (G. Kamradt, 2023)
    recall    tokens that stand twice in random tokens: the second time their first half is given,
              the second half is asked. Needs no language, so that small models can do it.

Each is asked at several depths (share of the text before it) and lengths (tokens).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.run import evaluating
from headwise.instruments.tokens import Tokens

__all__ = ["KINDS", "Retrieval", "retrieval"]

KINDS = ("passkey", "needle", "recall")
_MONOTONOUS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. "
_PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Quito", "Dakar", "Riga")
_THINGS = ("a blue kite", "two brass keys", "an old violin", "a jar of honey", "seven red apples")


@dataclass(frozen=True)
class Retrieval:
    """kind: of `KINDS`. rows: (length in tokens, depth, share of answer tokens that are right,
    share of answers that are right whole, trials)."""

    kind: str
    rows: tuple[tuple[int, float, float, float, int], ...]

    @property
    def tokens(self) -> float:
        """Share of answer tokens that are right, mean over lengths and depths."""
        return sum(row[2] for row in self.rows) / len(self.rows)

    @property
    def answers(self) -> float:
        """Share of answers that are right from the first token to the last."""
        return sum(row[3] for row in self.rows) / len(self.rows)


def retrieval(
    model: nn.Module,
    tokenizer: Any | None = None,
    kind: str = "recall",
    lengths: Sequence[int] = (128, 256),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9),
    trials: int = 2,
    cache: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
) -> Retrieval:
    """Ask a causal language model; its own greedy answers, the right ones so far being given.

    cache: makes the cache for each prompt, such as `lambda model: HeadCache(model, budget=0.25)`;
    None: the model's own. tokenizer: of the kinds that are text; "recall" takes the model's
    vocabulary. Raises ValueError for a kind that is not known, for lengths too short for the
    question.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if kind != "recall" and tokenizer is None:
        raise ValueError(f"{kind!r} is asked in words: give tokenizer=, or kind='recall'")
    if trials < 1 or not lengths or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"lengths={list(lengths)}, depths={list(depths)}, trials={trials}: expected some of "
            "each, depths from 0 (the beginning) to 1 (the end)"
        )
    draw = random.Random(seed)
    device = next(model.parameters()).device
    rows = []
    with torch.no_grad(), evaluating(model):
        for length in lengths:
            for depth in depths:
                parts = whole = 0.0
                for _ in range(trials):
                    if kind == "recall":
                        prompt, answer = _recall(model, length, depth, draw)
                    else:
                        prompt, answer = _in_words(tokenizer, kind, length, depth, draw)
                    made = None if cache is None else cache(model)
                    right = _right(model, prompt.to(device), answer.to(device), made)
                    parts += float(right.double().mean()) / trials
                    whole += float(right.all()) / trials
                rows.append((length, float(depth), parts, whole, trials))
    return Retrieval(kind, tuple(rows))


def _right(model: nn.Module, prompt: Tensor, answer: Tensor, cache: Any) -> Tensor:
    """`(answer,)`: which answer tokens the model would have said itself."""
    # the prompt's last token comes with the answer, after what is kept of the rest was decided
    first = model(input_ids=prompt[None, :-1], past_key_values=cache, use_cache=True)
    rest = torch.cat([prompt[-1:], answer[:-1]])
    logits = model(
        input_ids=rest[None], past_key_values=first.past_key_values, use_cache=True
    ).logits[0]
    found: Tensor = logits[-len(answer) :].argmax(-1) == answer
    return found


def _recall(
    model: nn.Module, length: int, depth: float, draw: random.Random
) -> tuple[Tensor, Tensor]:
    vocabulary = int(getattr(model.config, "vocab_size", 0))
    span = 8
    room = length - span - span // 2
    if vocabulary < 16 or room < span:
        raise ValueError(
            f"length {length}, vocabulary {vocabulary}: recall needs 16 words and {3 * span} tokens"
        )
    ids = [draw.randrange(vocabulary) for _ in range(room)]
    key = draw.sample(range(vocabulary), span)
    at = round(depth * room)
    prompt = [*ids[:at], *key, *ids[at:], *key[: span // 2]]
    return torch.tensor(prompt), torch.tensor(key[span // 2 :])


def _in_words(
    tokenizer: Any, kind: str, length: int, depth: float, draw: random.Random
) -> tuple[Tensor, Tensor]:
    if kind == "passkey":
        key = str(draw.randrange(10_000, 100_000))
        said = f"The pass key is {key}. Remember it. {key} is the pass key. "
        asked, wanted = "What is the pass key? The pass key is", f" {key}"
    else:
        place, thing = draw.choice(_PLACES), draw.choice(_THINGS)
        said = f"The man in {place} keeps {thing} under his bed. "
        asked, wanted = f"What is under his bed? The man in {place} keeps", f" {thing}"

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    special, _ = Tokens(tokenizer, None).around
    around = len(special) + len(ids(said)) + len(ids(asked))
    room = length - around
    if room < 1:
        raise ValueError(f"length {length}: the {kind} and the question alone are {around} tokens")
    filler = ids(_MONOTONOUS * (room // max(1, len(ids(_MONOTONOUS))) + 2))[:room]
    at = round(depth * room)
    prompt = [*special, *filler[:at], *ids(said), *filler[at:], *ids(asked)]
    return torch.tensor(prompt), torch.tensor(ids(wanted))
