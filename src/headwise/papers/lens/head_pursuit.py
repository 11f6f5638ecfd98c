"""Heads that speak about one thing, found by pursuing tokens through many of their outputs.

The logit lens reads one vector. The paper takes what a head writes over many samples as signals and
the unembedding as a dictionary, and asks which few tokens explain all of them together:
simultaneous orthogonal matching pursuit. Restricted to the tokens of a concept (colours, countries,
swear words), the share of variance that they explain ranks heads by how much they are about it,
whatever the size of what they write. The ranking is put to work by scaling the outputs of the few
heads at its top: turned around they suppress the concept, enlarged they push it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import Scale, swap
from headwise.instruments.pursuit import head_outputs, pursuit, token_atoms
from headwise.models import ModelView
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, claim, paper, picture
from headwise.parts import Attention
from headwise.tasks.task import IGNORED, Batch, Task
from headwise.train import fit, seeded

Head = tuple[int, int]


@paper(
    title="Head Pursuit: Probing Attention Specialization in Multimodal Transformers",
    source="arXiv 2510.21518",
    year=2025,
    modality="multimodal",
    plain="Rank heads by how much of what they write is explained by a few tokens of a concept, "
    "and scale the best ones to suppress or push it.",
    equation=r"v_{t+1} = \mathrm{argmax}_v \sum_i |\langle R_i, D_v \rangle|, \quad "
    r"\mathrm{score} = 1 - \lVert R \rVert_F^2 / \lVert H \rVert_F^2",
    parts=(),
    reported="Editing about 1 % of the heads suppresses or enhances a concept in language and "
    "vision-language models.",
    unsure="Whether the final norm's gain belongs to the dictionary; here it does. Heads and "
    "concepts are those of a one-layer model that answers with words of four kinds.",
    taxonomy=("beyond/analysis",),
    use="""
import torch
from headwise.models.backbones import Decoder
from headwise.papers.lens.head_pursuit import head_pursuit
from headwise.parts import Attention

model = Decoder(32, 64, 2, mixer=lambda layer: Attention(64, 4, causal=True))
ranked = head_pursuit(model, {"input_ids": torch.randint(32, (16, 8))}, tokens=[3, 5, 9])
""",
)
def head_pursuit(
    model: nn.Module | ModelView,
    inputs: dict[str, Any],
    tokens: Sequence[int],
    steps: int | None = None,
    at: int = -1,
) -> dict[Head, float]:
    """(layer, head) -> share of the variance of what it writes at position `at` that `steps` tokens
    of a concept (half of them by default) explain, the largest first. Raises ValueError for no
    tokens, UnsupportedModelError where the answer is not linear in what heads write."""
    if not len(tokens):
        raise ValueError("a concept needs tokens: none were given")
    return relevance(
        head_outputs(model, inputs, at),
        token_atoms(model, tokens),
        (len(tokens) + 1) // 2 if steps is None else steps,
    )


def relevance(outputs: dict[Head, Tensor], atoms: Tensor, steps: int) -> dict[Head, float]:
    """The same for outputs `(samples, width)` and atoms that are there already."""
    found = {head: pursuit(x, atoms, steps).explained[-1] for head, x in outputs.items()}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


# -- planted heads


def by_logits(outputs: dict[Head, Tensor], atoms: Tensor, steps: int) -> dict[Head, float]:
    """The control, a logit lens: how large the concept's logits are on the average."""
    atoms = nn.functional.normalize(atoms, dim=-1)
    found = {head: float((x @ atoms.mT).abs().mean()) for head, x in outputs.items()}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


@claim(
    subject=relevance,
    control=by_logits,
    unit="planted heads among the first three",
    seeds=(0, 1, 2),
)
def planted_heads_come_first(rank: Any, seed: int) -> Measured:
    """Of 32 heads three write noisy mixtures of five atoms of a concept; the others write more, at
    random. The three come first by explained variance, and not by the size of the logits."""
    atoms = torch.randn(5, 64, dtype=torch.float64)
    outputs = {(0, h): 6 * torch.randn(100, 64, dtype=torch.float64) for h in range(32)}
    for head in (4, 11, 25):
        noise = 0.1 * torch.randn(100, 64, dtype=torch.float64)
        mixture = torch.rand(100, 5, dtype=torch.float64) @ atoms
        outputs[0, head] = mixture / 3 + noise
    first = list(rank(outputs, atoms, 5))[:3]
    return at_least(float(len(set(first) & {(0, 4), (0, 11), (0, 25)})), 3.0)


# -- trained: answers of four kinds


class WordsOfKinds(Task):
    """A line names one word of each of four kinds, in any order, and then asks for a kind: the word
    of that kind is to be said. Eight words a kind; chance is 1 / 32, and 1 / 4 for who copies any.
    """

    kinds, words = 4, 8

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.vocabulary = self.kinds * self.words + self.kinds

    @classmethod
    def examples(cls) -> tuple[WordsOfKinds, ...]:
        return (cls(),)

    def tokens(self, kind: int) -> list[int]:
        return list(range(kind * self.words, (kind + 1) * self.words))

    def make(self, size: int, generator: torch.Generator) -> Batch:
        first = self.words * torch.arange(self.kinds)
        named = torch.randint(self.words, (size, self.kinds), generator=generator) + first
        order = torch.rand(size, self.kinds, generator=generator).argsort(1)
        kind = torch.randint(self.kinds, (size, 1), generator=generator)
        ids = torch.cat([named.gather(1, order), self.kinds * self.words + kind], 1)
        targets = torch.full_like(ids, IGNORED)
        targets[:, -1:] = named.gather(1, kind)
        return Batch({"input_ids": ids}, targets, {"kind": kind[:, 0]})


HEADS = 16


@cache
def trained(seed: int) -> Decoder:
    """One layer of sixteen heads, until it is never wrong."""
    task = WordsOfKinds()
    with seeded(seed):
        model = Decoder(
            task.vocabulary,
            64,
            1,
            mixer=lambda layer: Attention(64, HEADS, causal=True),
            feed=lambda layer: None,
            tied=False,
        )
    fit(model, task, steps=500, size=128, rate=5e-3, seed=seed, target=0.01)
    return model.eval()


def accuracies(model: nn.Module) -> Tensor:
    """For each kind of answer `(kinds,)`."""
    batch = WordsOfKinds().batch(0, 512, "test")
    with torch.no_grad():
        said = model(batch.inputs["input_ids"])[:, -1].argmax(-1)
    right = (said == batch.targets[:, -1]).double()
    return torch.stack([right[batch.facts["kind"] == kind].mean() for kind in range(4)])


def pursued(model: nn.Module, kind: int, seed: int) -> list[list[Head]]:
    """The three heads that are most about a kind."""
    inputs = WordsOfKinds().batch(0, 256, "valid").inputs
    return [list(head_pursuit(model, inputs, WordsOfKinds().tokens(kind)))[:3]]


def drawn(model: nn.Module, kind: int, seed: int) -> list[list[Head]]:
    """The control: three heads, drawn five times."""
    draw = torch.Generator().manual_seed(10 * seed + kind)
    picks = [torch.randperm(HEADS, generator=draw)[:3].tolist() for _ in range(5)]
    return [[(0, h) for h in pick] for pick in picks]


def lost(choose: Any, seed: int, factor: float) -> tuple[Tensor, Tensor]:
    """Accuracy lost where heads chosen for a kind are scaled: of that kind and of the others, means
    over the kinds."""
    model, own, other = trained(seed), [], []
    before = accuracies(model)
    for kind in range(4):
        for heads in choose(model, kind, seed):
            with swap(model, {head: Scale(factor) for head in heads}):
                fell = before - accuracies(model)
            own.append(fell[kind])
            other.append((fell.sum() - fell[kind]) / 3)
    return torch.stack(own).mean(), torch.stack(other).mean()


@claim(subject=pursued, control=drawn, unit="accuracy lost", seeds=(0, 1, 2))
def turning_heads_around_suppresses_their_concept(choose: Any, seed: int) -> Measured:
    """Multiplying three of sixteen heads by -1, chosen for a kind of words, costs at least 0.25
    more of the answers of that kind than of the others; three at random do not choose."""
    own, other = lost(choose, seed, -1.0)
    return at_least(own - other, 0.25, own=own, other=other)


@picture
def who_speaks_of_what() -> Picture:
    """Explained variance of every head for every kind of words."""
    inputs = WordsOfKinds().batch(0, 256, "valid").inputs
    rows = []
    for kind in range(4):
        found = head_pursuit(trained(0), inputs, WordsOfKinds().tokens(kind))
        rows.append([found[0, h] for h in range(HEADS)])
    return Picture(
        title="Share of what a head writes that words of a kind explain",
        x="head",
        y="kind of words",
        maps={"one layer of sixteen heads": rows},
    )
