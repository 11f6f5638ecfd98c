"""One number a head, on the first token, and no training.

The first token holds much of the attention of many heads and says nothing. The paper's finding is
that its weight is a control: multiplying the weight of that one token by g and letting the rest be
normalised sharpens (g < 1) or flattens (g > 1) everything else the head says, and heads differ in
which of the two helps. So each head is tried with more and with less of its sink on a few
calibration examples; heads are sorted into those that gain from more and those that gain from less;
and the larger group gets the best factor. Without labels, the entropy of the answer stands in for
the loss. In any kernel it is ln g added to one key's score.

The model here is planted: five heads look for the evidence of a class but leave most weight on the
first token, three others listen to distractors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import ScaleSink, ScaleTokens, Temperature, swap
from headwise.edits.change import Change
from headwise.instruments.examples import model_view
from headwise.instruments.metrics import Called, Metric, metric_of
from headwise.instruments.profiles import profile
from headwise.models import observe, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention
from headwise.train import seeded

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Tuned:
    """heads: the group that is changed; factor: of the first token's weight in them."""

    heads: list[tuple[int, int]]
    factor: float
    changes: dict[Any, Change]


def final_entropy(logits: Tensor, inputs: Any) -> Tensor:
    """Entropy of the answer in nats, `(batch,)`: that before the last token, as labels have it."""
    logs = logits[:, -2].log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


@paper(
    title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models "
    "Without Training",
    source="arXiv 2505.11739",
    year=2025,
    modality="text",
    plain="Scale the attention of chosen heads to the first token by one factor, found on a few "
    "examples, with labels or by the entropy of the answers.",
    equation=r"a_0' = \frac{g\,a_0}{D}, \quad a_i' = \frac{a_i}{D}, \quad D = g\,a_0 + 1 - a_0",
    parts=("Attention",),
    reported="Llama 3.1 8B: +11.71 % on classification, +2.64 % on question answering, 7.804 to "
    "7.966 on multi-turn dialogue.",
    unsure="How the paper breaks ties between the groups; here the larger group by the number of "
    "heads is tuned.",
    taxonomy=("beyond/analysis",),
    use="""
import headwise
from headwise.papers.steer.zero_tuning import examples, planted, zero_tuning

model, given = planted(), examples(0, 64)
with headwise.swap(model, zero_tuning(model, given).changes):
    model(given["input_ids"])
""",
)
def zero_tuning(
    model: nn.Module,
    inputs: Inputs,
    metric: str | Metric = "loss",
    factors: tuple[float, ...] = (0.1, 0.25, 0.5, 2.0, 4.0, 10.0),
    make: Callable[[float], Change] = ScaleSink,
) -> Tuned:
    """Heads in two groups by what less and more of the first token does to them, the larger group
    with the factor that lowers `metric` most on these inputs."""
    wanted = metric_of(metric)
    changes = {"more": make(4.0), "less": make(0.25)}
    table = profile(model, inputs, wanted, changes, batch_size=1024)
    prefers_less = table.heads["less"] < table.heads["more"]
    helped = table.heads["less"].clip(max=0) + table.heads["more"].clip(max=0) < 0
    less, more = prefers_less & helped, ~prefers_less & helped
    group = less if less.sum() >= more.sum() else more
    rows = group.nonzero()[0]
    heads = [(int(table.heads["layer"][r]), int(table.heads["head"][r])) for r in rows]
    tried = {
        factor: _mean(model, inputs, wanted, {head: make(factor) for head in heads})
        for factor in (1.0, *factors)
    }
    best = min(tried, key=tried.__getitem__)
    return Tuned(heads, best, {head: make(best) for head in heads})


@torch.no_grad()
def _mean(model: nn.Module, inputs: Inputs, metric: Metric, changes: dict[Any, Change]) -> float:
    with swap(model_view(model), changes):
        return float(metric.score(model(inputs["input_ids"]), inputs).mean())


# -- a model in which the truth is known ----------------------------------------------------------

DIM, HEADS, LENGTH, CLASSES = 32, 8, 24, 4
SINKING = [(0, head) for head in range(5)]
"""The heads that look for evidence, and leave too much on the first token."""
START, EVIDENCE, DISTRACTOR, ASKS = range(4)
"""Features of the residual, and the number of the first token of each sort is 0, 1, 5, 9."""


@cache
@torch.no_grad()
def planted() -> Decoder:
    """Heads 0 to 4 look for evidence, 5 to 7 for distractors; both know the first token."""
    with seeded(0):
        model = Decoder(
            16,
            DIM,
            1,
            lambda layer: Attention(DIM, HEADS, causal=True),
            feed=lambda layer: None,
            norm=nn.RMSNorm,
            tied=False,
        ).eval()
    look = view(model)
    table, read = look.embedding, look.unembedding
    (attention,) = look.attentions
    assert table is not None
    assert read is not None
    table[:, :DIM] = 0.0
    table[0, START], table[9, ASKS] = 1.0, 1.0
    for c in range(CLASSES):
        table[1 + c, EVIDENCE] = table[1 + c, 4 + c] = 1.0
        table[5 + c, DISTRACTOR] = table[5 + c, 4 + c] = 1.0
    table[10:, 8:20] = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    q, k, v, o = (
        attention.query_weight(),
        attention.key_weight(),
        attention.value_weight(),
        attention.output_weight(),
    )
    for weight in (q, k, v, o):
        weight.zero_()
    for head in range(HEADS):
        sinks = (0, head) in SINKING
        q[head, 0, ASKS] = 1.0
        # behind the norm a token of one feature has 32^0.5 there, one of two has 4
        k[head, 0, START] = (6.5 if sinks else 4.5) * 2 / 32
        k[head, 0, EVIDENCE if sinks else DISTRACTOR] = (4.0 if sinks else 3.0) * 2 / 32**0.5 / 4
        v[head, :, 4:8] = torch.eye(4)
        o[head, 28:] = torch.eye(4)
    read.zero_()
    read[1 : 1 + CLASSES, 28:] = 1.5 * torch.eye(4)
    return model


def examples(seed: int, count: int = 512) -> Inputs:
    """One token of evidence, six distractors, fillers; asked behind them. The class's token is the
    label of the last place."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 16, (count, LENGTH), generator=random)
    place = torch.rand(count, LENGTH - 3, generator=random).argsort(1)[:, :7] + 1
    kinds = torch.randint(0, CLASSES, (count, 7), generator=random)
    ids.scatter_(1, place, kinds + 5)
    ids.scatter_(1, place[:, :1], kinds[:, :1] + 1)
    ids[:, 0], ids[:, -2], ids[:, -1] = 0, 9, 10
    labels = torch.full_like(ids, -100)
    labels[:, -1] = kinds[:, 0] + 1
    return {"input_ids": ids, "labels": labels}


def another_token(factor: float) -> Change:
    """The control: the same on the fourth token."""
    return ScaleTokens(3, factor)


def without_normalising(factor: float) -> Change:
    """The control: a temperature, which changes proportions among the other tokens."""
    return Temperature(factor)


# -- claims ---------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


@claim(subject=ScaleSink, control=without_normalising, unit="largest difference", seeds=SEEDS)
def gaps_shrink_by_the_normaliser(make: Callable[[float], Change], seed: int) -> Measured:
    """Weights are g a_0 / D and a_i / D, to 1e-6, on random maps: every gap between other tokens
    is 1 / D of what it was."""
    with seeded(seed):
        model = Decoder(16, DIM, 1, lambda layer: Attention(DIM, HEADS, causal=True))
        model.double().eval()
    before, after = _maps(model, seed, {}), _maps(model, seed, {"all": make(3.0)})
    first = before[..., :1]
    divisor = 3.0 * first + 1 - first
    want = torch.cat([3.0 * first, before[..., 1:]], -1) / divisor
    return at_most((after - want).abs().max(), 1e-6)


@torch.no_grad()
def _maps(model: nn.Module, seed: int, changes: dict[Any, Change]) -> Tensor:
    kept: list[Tensor] = []
    ids = examples(seed, 4)["input_ids"]
    with observe(view(model), lambda r: kept.append(r.map.dense())), swap(model, changes):
        model(ids)
    return kept[0].double()


@claim(subject=ScaleSink, control=another_token, unit="nats", seeds=SEEDS)
def profiling_names_the_heads_that_sink_too_much(
    make: Callable[[float], Change], seed: int
) -> Measured:
    """Less weight on the first token gains every planted head 0.2 nats more than any other head:
    the profile tells the two sorts apart."""
    table = profile(planted(), examples(seed, 128), "loss", {"less": make(0.25)}, batch_size=1024)
    gain = torch.from_numpy(-table.heads["less"])
    sinking = torch.tensor([(0, head) in SINKING for head in range(HEADS)])
    return at_least(gain[sinking].min() - gain[~sinking].max(), 0.2, least=gain[sinking].min())


def _gain(make: Callable[[float], Change], seed: int, metric: str | Metric) -> tuple[float, float]:
    """Accuracy on held-out examples, before and after."""
    model, held_out = planted(), examples(1000 + seed)
    tuned = zero_tuning(model, examples(seed, 128), metric, make=make)
    hits = metric_of("accuracy")
    return _mean(model, held_out, hits, {}), _mean(model, held_out, hits, tuned.changes)


@claim(subject=ScaleSink, control=another_token, unit="points of accuracy", seeds=SEEDS)
def the_first_token_is_worth_tuning(make: Callable[[float], Change], seed: int) -> Measured:
    """Accuracy on held-out examples rises by more than 5 points; tuning another token does not."""
    before, after = _gain(make, seed, "loss")
    return at_least(100 * (after - before), 5.0, before=before, after=after, chance=1 / CLASSES)


@claim(subject=ScaleSink, control=another_token, unit="points of accuracy", seeds=SEEDS)
def entropy_serves_without_labels(make: Callable[[float], Change], seed: int) -> Measured:
    """The same where heads and factor are chosen by the entropy of the answers alone."""
    before, after = _gain(make, seed, Called(final_entropy))
    return at_least(100 * (after - before), 5.0, before=before, after=after)


@picture
def accuracy_by_factor() -> Picture:
    """Accuracy over the factor, in the heads that sink too much, in the others, in all."""
    model, given, hits = planted(), examples(5), metric_of("accuracy")
    factors = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    others = [(0, head) for head in range(HEADS) if (0, head) not in SINKING]
    groups = {"heads that sink too much": SINKING, "the others": others, "all": SINKING + others}
    return Picture(
        title="Accuracy by the factor on the first token",
        x="g",
        y="accuracy",
        log="x",
        lines={
            name: (
                factors,
                [_mean(model, given, hits, {h: ScaleSink(g) for h in heads}) for g in factors],
            )
            for name, heads in groups.items()
        },
    )
