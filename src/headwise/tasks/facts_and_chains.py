"""What is known by heart and what is worked out from the context, asked in the same lines."""

from __future__ import annotations

from typing import Self

import torch

from headwise.tasks.circuits.known import Contrast
from headwise.tasks.drawing import distinct
from headwise.tasks.task import IGNORED, Batch, Task

KINDS = ("both", "recall", "reasoning")


class FactsAndChains(Task):
    """Six links of three chains in any order, then three questions with their answers written out:
    `entity relation value`, whose value is always the same, or `a b value`, which the links
    `a b` and `b value` say, and of which b is asked too.

    Tokens: `kinds` names that chains begin with, as many in their middle, as many entities, 4
    relations, as many values. `kind`: which questions, "recall", "reasoning" or "both" (three in
    ten are facts). Answers to both sorts are values.

    Solved by feed-forward layers or embeddings that hold the facts, and two attention layers (a
    name joined to what follows it, then looked up) for the chains. Facts are not solved by any
    look at the line. Chance: 1 / kinds.

    After: Disentangling Recall and Reasoning in Transformer Models, arXiv 2510.03366. Raises
    ValueError for another kind, and fewer than 4 names.
    """

    relations, chains = 4, 3

    def __init__(self, kind: str = "both", kinds: int = 16, seed: int = 0) -> None:
        if kind not in KINDS or kinds < 4:
            raise ValueError(
                f"FactsAndChains(kind={kind!r}, kinds={kinds}): kind is one of {', '.join(KINDS)}, "
                "kinds 4 or more"
            )
        self.kind, self.kinds, self.seed = kind, kinds, seed
        self.vocabulary = 4 * kinds + self.relations
        self.first_value = self.vocabulary - kinds
        drawn = torch.randint(kinds, (kinds, self.relations), generator=self.world())
        self.table = drawn + self.first_value

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Small instances."""
        return cls(), cls("recall", 8), cls("reasoning", 5)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.kinds

    def make(self, size: int, generator: torch.Generator) -> Batch:
        """input_ids `(size, 21)`; facts: `recall` `(size, 3)`, whether a question asks a fact."""
        g = generator
        a, b, end, entity = (distinct(size, self.chains, self.kinds, g) for _ in range(4))
        b, end = b + self.kinds, end + self.first_value
        links = torch.stack([torch.stack([a, b], 2), torch.stack([b, end], 2)], 1).flatten(1, 2)
        order = torch.rand(links.shape[:2], generator=g).argsort(1)[..., None].expand_as(links)
        relation = torch.randint(self.relations, a.shape, generator=g)
        held = self.table[entity, relation]
        fact = torch.stack([2 * self.kinds + entity, 3 * self.kinds + relation, held], 2)
        chain = torch.stack([a, b, end], 2)
        turn = torch.rand(a.shape, generator=g).argsort(1)[..., None].expand_as(chain)
        chain = chain.gather(1, turn)
        share = {"both": 0.3, "recall": 1.0, "reasoning": 0.0}[self.kind]
        recall = torch.rand(a.shape, generator=g) < share
        said = torch.where(recall[..., None], fact, chain)
        answers = torch.stack(
            [
                said[..., 1].masked_fill(recall, IGNORED),
                said[..., 2],
                torch.full_like(recall, IGNORED, dtype=torch.long),
            ],
            2,
        )
        line = torch.cat([links.gather(1, order).flatten(1), said.flatten(1)], 1)
        none = torch.full((size, 4 * self.chains), IGNORED)
        targets = torch.cat([none, answers.flatten(1)], 1)
        return Batch({"input_ids": line}, targets, {"recall": recall})

    def contrast(self, count: int, step: int) -> Contrast:
        """Test lines, and the same with another answer to the last question: another entity is
        asked about, or two chains have each other's end. Raises ValueError where kind is both."""
        if self.kind == "both":
            raise ValueError("a contrast is of one kind: FactsAndChains('recall') or 'reasoning'")
        line = self.batch(step, count, "test").inputs["input_ids"]
        right, other = line[:, -1], line.clone()
        if self.kind == "recall":
            table = self.table[:, line[:, -2] - 3 * self.kinds].T  # (count, entities)
            entity = (table != right[:, None]).float().argmax(1)
            wrong = table.gather(1, entity[:, None])[:, 0]
            other[:, -3] = 2 * self.kinds + entity
        else:
            links = line[:, : 4 * self.chains]
            ends = links[links >= self.first_value].view(count, self.chains)
            wrong = torch.where(ends[:, 0] == right, ends[:, 1], ends[:, 0])
            is_right, is_wrong = line == right[:, None], line == wrong[:, None]
            swapped = torch.where(is_wrong, right[:, None], line)
            other = torch.where(is_right, wrong[:, None], swapped)
        return Contrast({"input_ids": line}, {"input_ids": other}, right, wrong, -2)
