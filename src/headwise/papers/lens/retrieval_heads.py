"""Few heads fetch what a long context holds, and without them it is not found.

When a model repeats a fact from far back, some head looks at the token that it is about to say. The
paper counts this: over many contexts, depths and needles, a head's retrieval score is the share of
needle tokens at whose saying its largest weight lies on that very token in the needle. Few heads
score high, they are the same whatever the context, and taking them out breaks retrieval while
taking out others does not. Only the place of a row's largest weight is needed, so that the score
streams over a context of any length.

The model here is small and trained: a layer that joins each token to the one before it, then two
layers of four heads, asked for values of keys that stood at the beginning among other tokens. So
small a model has nothing else for its heads to do, and all of them learn to copy; a small price on
every head, as limited capacity and weight decay are in a large one, leaves few.
`headwise see` measures the same score on any model and text (column `retrieval_score`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import Silence, swap
from headwise.maps import AttentionMap
from headwise.models import observe, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Mixer, TokenShift
from headwise.tasks import Batch, MultiQueryRecall
from headwise.tasks.task import IGNORED
from headwise.train import fit, seeded

THRESHOLD = 0.1
"""A head that scores as much is a retrieval head (section 2)."""
Head = tuple[int, int]
Copies = Callable[[AttentionMap, Batch, int], Tensor]


def copied(seen: AttentionMap, batch: Batch, needle: int) -> Tensor:
    """`(batch, heads, n)`: whether a row's largest weight lies on the token that is to be said
    next, among the first `needle` tokens. Rows are looked at one after the other."""
    ids = batch.inputs["input_ids"]
    key = torch.cat(
        [seen.rows(torch.tensor([i])).argmax(-1) for i in range(ids.shape[1])], -1
    )  # (batch, heads, n)
    held = ids[:, None].expand(-1, key.shape[1], -1).gather(-1, key)
    return (key < needle) & (held == batch.targets[:, None])


@paper(
    title="Retrieval Head Mechanistically Explains Long-Context Factuality",
    source="arXiv 2404.15574",
    year=2024,
    modality="text",
    plain="Score each head by how often its largest weight lies on the very token that is copied "
    "from a needle; the few that score high do the retrieval.",
    equation=r"\mathrm{score}(h) = \frac{|g_h \cap k|}{|k|}, \quad "
    r"g_h = \{w : j = \mathrm{argmax}_i\, a_h(i),\ x_j = w,\ j \in \mathrm{needle}\}",
    parts=("Attention", "TokenShift"),
    reported="Under 5 % of the heads of 4 model families are retrieval heads; 12 of Llama 2 7B "
    "are active whatever the context; without them models invent.",
    unsure="The paper averages over about 600 generated answers of large models; the answers here "
    "are teacher-forced, which for a model that answers right is the same.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.lens.retrieval_heads import retrieval_scores, task, trained

scores = retrieval_scores(trained(0), task())  # (layer, head) -> share of needles copied
""",
)
@torch.no_grad()
def retrieval_scores(
    model: nn.Module, data: MultiQueryRecall, copies: Copies = copied, count: int = 64
) -> dict[Head, float]:
    """(layer, head) -> retrieval score, over `count` contexts, every asked value a needle token."""
    batch = data.batch(0, count, "test")
    asked = (batch.targets != IGNORED)[:, None]
    found: dict[Head, float] = {}

    def read(reading: Any) -> None:
        hits = (copies(reading.map, batch, 2 * data.pairs) & asked).float()
        share = hits.sum((0, 2)) / asked.sum()
        found.update({(reading.attention.layer, head): float(s) for head, s in enumerate(share)})

    with observe(view(model), read):
        model(**batch.inputs)
    return found


def by_whole_map(seen: AttentionMap, batch: Batch, needle: int) -> Tensor:
    """The same from the dense map, with loops."""
    dense, ids = seen.dense().double(), batch.inputs["input_ids"]
    hits = torch.zeros(dense.shape[:3], dtype=torch.bool)
    for b in range(dense.shape[0]):
        for h in range(dense.shape[1]):
            for i in range(dense.shape[2]):
                j = int(dense[b, h, i].argmax())
                hits[b, h, i] = j < needle and int(ids[b, j]) == int(batch.targets[b, i])
    return hits


def looks_at_needles(seen: AttentionMap, batch: Batch, needle: int) -> Tensor:
    """The control: the largest weight lies on some needle, whichever."""
    rows = torch.arange(batch.targets.shape[1])
    return seen.rows(rows).argmax(-1) < needle


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


def task(length: int = 48) -> MultiQueryRecall:
    """Four keys with their values, then other tokens among which the keys are asked."""
    return MultiQueryRecall(pairs=4, length=length, vocabulary=32, power=1.0)


class Priced(Decoder):
    """Every head has a price, the norms of its four weights (group lasso)."""

    price = 0.01

    def penalty(self) -> Tensor:
        norms = [
            weight.pow(2).sum((1, 2)).sqrt().sum()
            for a in view(self).attentions
            for weight in (a.query_weight(), a.key_weight(), a.value_weight(), a.output_weight())
        ]
        return self.price * torch.stack(norms).sum()


def _fitted(kind: type[Decoder], seed: int) -> Decoder:
    def mixer(layer: int) -> Mixer:
        return Attention(64, 4, causal=True) if layer else TokenShift(64, causal=True)

    with seeded(seed):
        model = kind(32, 64, 3, mixer, feed=lambda layer: None, tied=False)
    fit(model, task(), steps=300, size=32, rate=5e-3, seed=seed)
    return model.eval()


@cache
def trained(seed: int) -> Decoder:
    return _fitted(Priced, seed)


@cache
def trained_freely(seed: int) -> Decoder:
    """The control: heads have no price."""
    return _fitted(Decoder, seed)


@claim(subject=copied, control=looks_at_needles, unit="largest difference", seeds=SEEDS)
def streaming_is_the_dense_score(copies: Copies, seed: int) -> Measured:
    """Scores from rows alone are those of the dense map, exactly."""
    model = trained(seed)
    ours = retrieval_scores(model, task(), copies, 8)
    dense = retrieval_scores(model, task(), by_whole_map, 8)
    return at_most(max(abs(ours[head] - dense[head]) for head in dense), 0.0)


@claim(subject=trained, control=trained_freely, unit="share of heads", seeds=SEEDS)
def retrieval_heads_are_few(make: Callable[[int], Decoder], seed: int) -> Measured:
    """Under half of the heads score 0.1 where a head has a price; where it has none, all eight of
    so small a model learn to copy."""
    scores = retrieval_scores(make(seed), task())
    few = sum(score >= THRESHOLD for score in scores.values()) / len(scores)
    return at_most(few, 0.49, best=max(scores.values()))


def highest(scores: dict[Head, float]) -> list[Head]:
    """The retrieval heads."""
    return [head for head, score in scores.items() if score >= THRESHOLD]


def lowest(scores: dict[Head, float]) -> list[Head]:
    """The control: as many heads, those that score lowest."""
    return sorted(scores, key=scores.__getitem__)[: len(highest(scores))]


@torch.no_grad()
def _recall(model: nn.Module, silenced: list[Head]) -> float:
    batch = task().batch(1, 128, "test")
    with swap(model, dict.fromkeys(silenced, Silence())):
        right = model(**batch.inputs).argmax(-1) == batch.targets
    return float(right[batch.targets != IGNORED].float().mean())


@claim(subject=highest, control=lowest, unit="points of recall", seeds=SEEDS)
def without_them_needles_are_lost(choose: Callable[..., list[Head]], seed: int) -> Measured:
    """Silencing the retrieval heads costs 50 points of recall or more; silencing as many that
    score lowest does not."""
    model = trained(seed)
    heads = choose(retrieval_scores(model, task()))
    before, after = _recall(model, []), _recall(model, heads)
    return at_least(100 * (before - after), 50.0, heads=float(len(heads)), before=before)


def same_model(seed: int) -> Decoder:
    return trained(seed)


def another_model(seed: int) -> Decoder:
    """The control: a model trained alike from another seed."""
    return trained((seed + 1) % len(SEEDS))


@claim(subject=same_model, control=another_model, unit="correlation of scores", seeds=SEEDS)
def they_are_the_same_in_longer_contexts(make: Callable[[int], Decoder], seed: int) -> Measured:
    """Scores in contexts of four times the trained length go with those in trained ones: 0.9."""
    here = retrieval_scores(trained(seed), task())
    there = retrieval_scores(make(seed), task(192), count=16)
    both = torch.tensor([[here[head], there[head]] for head in here]).T
    return at_least(torch.corrcoef(both)[0, 1].nan_to_num(), 0.9)


@picture
def scores_by_head() -> Picture:
    """Retrieval scores, sorted, of three models."""
    return Picture(
        title="Retrieval scores of the heads of three models",
        x="head, by score",
        y="share of needles copied",
        lines={
            f"seed {seed}": (
                list(range(8)),
                sorted(retrieval_scores(trained(seed), task()).values(), reverse=True),
            )
            for seed in SEEDS
        },
    )
