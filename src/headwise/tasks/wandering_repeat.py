"""Repetition at a distance that nobody knows: induction, and nothing else, solves it."""

from __future__ import annotations

from typing import Self

import torch

from headwise.tasks.drawing import distinct
from headwise.tasks.oracles.induction import Induction
from headwise.tasks.task import IGNORED, Batch, Task


class WanderingRepeat(Task):
    """`length` random tokens somewhere, and again at the end: `x y a b c z a b c`.

    Tokens 0 .. vocabulary - 1, no token stands twice before the second copy. `slack` other tokens
    stand before and behind the first copy, how many before is drawn for each problem: the distance
    tells nothing. Of the second copy all tokens but the first are asked.

    Solved by two attention layers (a previous-token head and an induction head), which small models
    learn within a few hundred steps. Not solved by one content-based layer, nor by one that knows
    distances, which finds one of slack + 1 right. Chance: 1 / vocabulary.
    """

    def __init__(
        self, length: int = 8, slack: int = 8, vocabulary: int = 32, seed: int = 0
    ) -> None:
        if length < 2 or slack < 1 or vocabulary < length + slack:
            raise ValueError(
                "WanderingRepeat needs length >= 2, slack >= 1 and vocabulary >= length + slack, "
                f"not length={length}, slack={slack}, vocabulary={vocabulary}"
            )
        self.length, self.slack, self.vocabulary, self.seed = length, slack, vocabulary, seed

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Small instances."""
        return cls(), cls(length=5, slack=9, vocabulary=20)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.vocabulary

    def make(self, size: int, generator: torch.Generator) -> Batch:
        """input_ids `(size, 2 length + slack - 1)`; facts: `distance` `(size,)` back to the answer,
        `answer` `(size,)` the place of that of the last token."""
        drawn = distinct(size, self.length + self.slack, self.vocabulary, generator)
        before = torch.randint(self.slack + 1, (size, 1), generator=generator)
        copy = drawn.gather(1, before + torch.arange(self.length))
        line = torch.cat([drawn, copy], 1)
        targets = line[:, 1:].clone()
        targets[:, : self.length + self.slack] = IGNORED
        before = before[:, 0]
        facts = {
            "distance": self.length + self.slack - before - 1,
            "answer": before + self.length - 1,
        }
        return Batch({"input_ids": line[:, :-1]}, targets, facts)

    def oracle(self) -> Induction:
        """Exact."""
        return Induction(self.vocabulary)
