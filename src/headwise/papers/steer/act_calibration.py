"""Attention sinks beyond the first token, found while the model runs and turned down.

Heads park attention not only on the first token but on others that say little, and where these
stand in the middle of the text they take weight from what matters. The paper finds them by what
they receive, lets them keep a share of it and gives the rest to the keys that are no sinks, in
proportion; rows still sum to one. Not every head is better for it: some use a sink to stay out of
the way. So heads are chosen offline, by what the calibration does to held-out examples.

The model here is planted: five heads look for the evidence of a class but leave most of their
weight on a loud token that says nothing; in three others the same token keeps weight away from
distractors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import CalibrateSinks, MoveMass, swap
from headwise.edits.change import Change
from headwise.instruments.metrics import metric_of
from headwise.instruments.profiles import profile
from headwise.models import observe, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention
from headwise.train import seeded

Inputs = dict[str, Tensor]
Choose = Callable[[nn.Module, Inputs, Change], list[tuple[int, int]]]


@paper(
    title="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models "
    "without Training through Attention Calibration",
    source="arXiv 2406.15765",
    year=2024,
    modality="text",
    plain="In heads chosen offline, tokens that receive far more than their share keep 0.4 of it; "
    "the rest goes to the other tokens in proportion.",
    equation=r"A'_{is} = \beta A_{is}, \quad A'_{ij} = A_{ij}\left(1 + "
    r"\frac{(1-\beta)\sum_{s} A_{is}}{\sum_{j \notin S} A_{ij}}\right), \quad "
    r"S = \{k > 0 : \bar a_k > \alpha / N\}",
    parts=("Attention",),
    reported="Up to +7.30 % average accuracy on Llama 30B, without training.",
    unsure="Whether the first token receives some of the mass: here it neither gives nor receives. "
    "The paper leaves out the outermost layers; the model here has one.",
    taxonomy=("beyond/analysis",),
    use="""
import headwise
from headwise.edits import CalibrateSinks
from headwise.papers.steer.act_calibration import examples, heads_to_calibrate, planted

model, change = planted(), CalibrateSinks(alpha=5.0, keep=0.4)
heads = heads_to_calibrate(model, examples(0, 64), change)
with headwise.swap(model, {head: change for head in heads}):
    model(examples(1, 4)["input_ids"])
""",
)
def heads_to_calibrate(
    model: nn.Module, inputs: Inputs, change: Change, worth: float = 0.01
) -> list[tuple[int, int]]:
    """The heads whose calibration, alone, lowers the loss on these inputs by more than `worth`."""
    table = profile(model, inputs, "loss", {"change": change}, batch_size=1024)
    rows = (table.heads["change"] < -worth).nonzero()[0]
    return [(int(table.heads["layer"][row]), int(table.heads["head"][row])) for row in rows]


# -- a model in which the truth is known ----------------------------------------------------------

DIM, HEADS, LENGTH, CLASSES = 32, 8, 24, 4
HURT = [(0, head) for head in range(5)]
"""The heads from which the loud token takes weight that they need."""
LOUD, EVIDENCE, DISTRACTOR, LOOKS = range(4)
"""Features of the residual: of the loud token (number 0), of evidence (1 to 4), of distractors (5
to 8), and of every token."""


@cache
@torch.no_grad()
def planted() -> Decoder:
    """Heads 0 to 4 look for evidence, 5 to 7 for distractors; all find the loud token."""
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
    table.zero_()
    table[:, LOOKS] = 1.0
    table[0, LOUD] = 1.0
    for c in range(CLASSES):
        table[1 + c, EVIDENCE] = table[1 + c, 4 + c] = 1.0
        table[5 + c, DISTRACTOR] = table[5 + c, 4 + c] = 1.0
    table[10:, 8:20] = 0.3 * torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    q, k, v, o = (
        attention.query_weight(),
        attention.key_weight(),
        attention.value_weight(),
        attention.output_weight(),
    )
    for weight in (q, k, v, o, read):
        weight.zero_()
    for head in range(HEADS):
        hurt = (0, head) in HURT
        # scores of the asking token: its feature is 5.66 behind the norm, the loud one's is 4, and
        # evidence and distractors have 3.27; scores are divided by 2
        q[head, 0, LOOKS] = 1.0
        k[head, 0, LOUD] = (6.5 if hurt else 4.5) / 11.3
        k[head, 0, EVIDENCE if hurt else DISTRACTOR] = (4.0 if hurt else 3.0) / 9.25
        v[head, :, 4:8] = torch.eye(4)
        o[head, 28:] = torch.eye(4)
    read[1 : 1 + CLASSES, 28:] = 1.5 * torch.eye(4)
    return model


def examples(seed: int, count: int = 512) -> Inputs:
    """The loud token among the first five, one token of evidence and six distractors later; asked
    at the last but one. The class's token is the label of the last place."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 16, (count, LENGTH), generator=random)
    place = torch.rand(count, LENGTH - 8, generator=random).argsort(1)[:, :7] + 6
    kinds = torch.randint(0, CLASSES, (count, 7), generator=random)
    ids.scatter_(1, place, kinds + 5)
    ids.scatter_(1, place[:, :1], kinds[:, :1] + 1)
    ids.scatter_(1, torch.randint(1, 6, (count, 1), generator=random), 0)
    ids[:, 0] = ids[:, -1] = 10
    ids[:, -2] = 9
    labels = torch.full_like(ids, -100)
    labels[:, -1] = kinds[:, 0] + 1
    return {"input_ids": ids, "labels": labels}


def another_token() -> Change:
    """The control: as much is taken from the ninth token, whatever it is."""
    return MoveMass(8, 0.6)


def by_what_sinks_hold(model: nn.Module, inputs: Inputs, change: Change) -> list[tuple[int, int]]:
    """The control: the heads that give much to the loud token, which looking would name."""
    ids = inputs["input_ids"]
    kept: list[Tensor] = []
    with torch.no_grad(), observe(view(model), lambda r: kept.append(r.map.mass_on(ids == 0))):
        model(ids)
    mass = kept[0][:, :, -2].mean(0)
    return [(0, int(head)) for head in (mass > 0.25).nonzero()]


# -- claims ---------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


@torch.no_grad()
def _maps(model: nn.Module, ids: Tensor, changes: dict[Any, Change]) -> Tensor:
    kept: list[Tensor] = []
    with observe(view(model), lambda r: kept.append(r.map.dense())), swap(model, changes):
        model(ids)
    return kept[0]


@claim(subject=CalibrateSinks, control=another_token, unit="largest difference", seeds=SEEDS)
def sinks_keep_exactly_their_share(make: Callable[[], Change], seed: int) -> Measured:
    """The sinks of every row keep 0.4 of their weight, rows sum to one and the proportions of the
    other keys stay, to 1e-5."""
    model, ids = planted(), examples(seed, 8)["input_ids"]
    before, after = _maps(model, ids, {}), _maps(model, ids, {"all": make()})
    n = ids.shape[1]
    sinks = before.mean(2, keepdim=True) > 5.0 / n
    sinks[..., 0] = False
    rest = ~sinks
    rest[..., 0] = False
    held, theirs = (before * sinks).sum(-1, keepdim=True), (before * rest).sum(-1, keepdim=True)
    moves = (theirs > 0) & (held > 0)
    want = torch.where(sinks, 0.4 * before, before * torch.where(rest, 1 + 0.6 * held / theirs, 1))
    want = torch.where(moves, want, before)
    return at_most((after - want).abs().max(), 1e-5, sinks=sinks.float().sum((1, 3)).mean())


def _accuracy(seed: int, heads: list[tuple[int, int]], change: Change) -> tuple[float, float]:
    """On held-out examples, before and after."""
    model, given, hits = planted(), examples(1000 + seed), metric_of("accuracy")
    with torch.no_grad():
        before = hits.score(model(given["input_ids"]), given).mean()
        with swap(model, dict.fromkeys(heads, change)):
            after = hits.score(model(given["input_ids"]), given).mean()
    return float(before), float(after)


@claim(subject=CalibrateSinks, control=another_token, unit="points of accuracy", seeds=SEEDS)
def calibration_raises_accuracy(make: Callable[[], Change], seed: int) -> Measured:
    """Held-out accuracy rises by 10 points or more where the heads are chosen on other examples."""
    change = make()
    heads = heads_to_calibrate(planted(), examples(seed, 128), change)
    before, after = _accuracy(seed, heads, change)
    return at_least(
        100 * (after - before), 10.0, before=before, after=after, heads=float(len(heads))
    )


@claim(control=by_what_sinks_hold, unit="Jaccard index", seeds=SEEDS)
def effects_choose_the_right_heads(choose: Choose, seed: int) -> Measured:
    """The chosen heads are exactly those that the sink hurts; heads that hold as much on it but
    need it are left alone. Choosing by what sinks hold takes them all."""
    heads = set(choose(planted(), examples(seed, 128), CalibrateSinks()))
    return at_least(len(heads & set(HURT)) / max(1, len(heads | set(HURT))), 1.0)


@picture
def a_calibrated_head() -> Picture:
    """One map before and after."""
    ids = examples(0, 1)["input_ids"]
    sides: dict[str, dict[Any, Change]] = {
        "as it is": {},
        "calibrated": {"all": CalibrateSinks()},
    }
    return Picture(
        title="A head with a sink in the middle of the text",
        x="key",
        y="query",
        maps={name: _maps(planted(), ids, change)[0, 0].tolist() for name, change in sides.items()},
    )
