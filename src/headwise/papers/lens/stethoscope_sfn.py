"""Which modules of a tuned model hold what the tuning taught it?

Between a model and its reasoning descendant lie only differences of weights. The paper listens to
them by kind of module (q, k, v, o, and the matrices of the feed-forward part) in four ways. Delta:
how far each kind moved. Merge: the base model with some kinds taken from the descendant. Freeze:
tune some kinds alone. Destruction: reset some kinds. From all four it argues that the attention's
output projection o carries reasoning, and the others fluent speech.

The small model here learns two things: to answer a token from a fixed table ("speech"), and to
recall a key's value from its context. Tuning then teaches it to answer with the value's partner.
That attention looks rightly already and only what it says must change is the paper's conjecture
about reasoning, put in by hand: what is tested is whether the tools find it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from headwise.instruments.module_kinds import chosen, delta, destroy, merge, modules_of
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Mixer, Mlp, TokenShift
from headwise.tasks import Batch, MultiQueryRecall, Task
from headwise.tasks.task import IGNORED
from headwise.train import fit, seeded


def freeze(
    base: nn.Module, wanted: Iterable[str], train: Callable[[nn.Module], object]
) -> nn.Module:
    """A copy trained by `train`, with gradients for the wanted kinds alone. Weight decay has to be
    off: it would move what has no gradient."""
    tuned = deepcopy(base)
    parameters = dict(tuned.named_parameters())
    kinds, labels = modules_of(base)
    for name, label in labels.items():
        mine = chosen(kinds, label, wanted)
        parameters[name].register_hook(lambda gradient, mine=mine: gradient * mine)
    train(tuned)
    return merge(base, tuned, wanted)  # a copy without the hooks


@dataclass(frozen=True)
class Diagnosis:
    """moved: share of the squared change, by kind. merged: the measure of the base model with one
    kind from the tuned one. destroyed: of the tuned model with one kind at zero."""

    moved: dict[str, float]
    merged: dict[str, float]
    destroyed: dict[str, float]


@paper(
    title="Who Reasons in the Large Language Models?",
    source="arXiv 2505.20993",
    year=2025,
    modality="text",
    plain="Compare a model and its tuned descendant by kind of module: how far each moved, what "
    "each brings when merged, learns when tuned alone, and costs when destroyed.",
    equation=r"\Delta_X = \lVert w_X(B) - w_X(A) \rVert_2^2, \quad M_S = (w_X(B) : X \in S,\ "
    r"w_X(A) : X \notin S)",
    parts=("Attention", "Mlp", "TokenShift"),
    reported="o_proj moves most or second most from Qwen2.5 to its reasoning descendants; merging "
    "it alone solves problems of AIME that the base model fails.",
    unsure="The paper tunes normalisations and embeddings along with o_proj, which in so small a "
    "model would learn the task by themselves: here they stay. Relative changes of single "
    "weights, whose distribution the paper also shows, are left out.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.lens.stethoscope_sfn import base, recall_of, stethoscope, tuned

found = stethoscope(base(0), tuned(0), recall_of)
found.moved["o"], found.merged["o"], found.destroyed["o"]
""",
)
def stethoscope(
    base: nn.Module, tuned: nn.Module, measure: Callable[[nn.Module], float]
) -> Diagnosis:
    """The stethoscopes that need no training, for each kind by itself."""
    moved = delta(base, tuned)
    total = sum(moved.values()) or 1.0
    return Diagnosis(
        {kind: square / total for kind, square in moved.items()},
        {kind: measure(merge(base, tuned, [kind])) for kind in moved},
        {kind: measure(destroy(tuned, [kind])) for kind in moved},
    )


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
HALF = 16


class Talk(MultiQueryRecall):
    """Recall among tokens that each have a fixed answer. `shift`: the value that is this far from
    the recalled one is asked instead. Fact `asked`: where recall is."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__(pairs=4, length=24, vocabulary=2 * HALF, power=1.0, filler="random")
        self.shift = shift

    @classmethod
    def examples(cls) -> tuple[Talk, ...]:
        return (cls(), cls(8))

    def make(self, size: int, generator: torch.Generator) -> Batch:
        batch = super().make(size, generator)
        ids, asked = batch.inputs["input_ids"], batch.targets != IGNORED
        speech = (2 * HALF - 1 - ids).index_fill(1, torch.arange(2 * self.pairs), IGNORED)
        values = HALF + (batch.targets - HALF + self.shift) % HALF
        return Batch(batch.inputs, torch.where(asked, values, speech), {"asked": asked})


@torch.no_grad()
def answers(model: nn.Module, task: Task) -> tuple[float, float]:
    """Accuracy of recall and of speech."""
    batch = task.batch(0, 256, "test")
    right = model(**batch.inputs).argmax(-1) == batch.targets
    asked = batch.facts["asked"]
    speech = ~asked & (batch.targets != IGNORED)
    return float(right[asked].float().mean()), float(right[speech].float().mean())


def recall_of(model: nn.Module) -> float:
    """Accuracy of the recall that was tuned for."""
    return answers(model, Talk(8))[0]


@cache
def base(seed: int) -> nn.Module:
    """Recalls, and speaks."""

    def mixer(layer: int) -> Mixer:
        return Attention(64, 4, causal=True) if layer else TokenShift(64, causal=True)

    with seeded(seed):
        model = Decoder(2 * HALF, 64, 2, mixer, feed=lambda layer: Mlp(64, 128), tied=False)
    fit(model, Talk(), steps=300, size=32, rate=5e-3, seed=seed)
    return model.eval()


@cache
def tuned(seed: int, kinds: tuple[str, ...] = ("o",)) -> nn.Module:
    """Tuned for the value's partner, in these kinds alone."""

    def train(model: nn.Module) -> None:
        fit(model, Talk(8), steps=150, size=32, rate=5e-3, seed=seed, decay=0.0)

    return freeze(base(seed), kinds, train).eval()


def everywhere(seed: int) -> nn.Module:
    """Tuned in all of its weights."""
    return tuned(seed, tuple(modules_of(base(seed))[0]))


def lengths(base: nn.Module, tuned: nn.Module) -> dict[str, float]:
    """The control: norms, not their squares, which do not add up."""
    return {kind: square**0.5 for kind, square in delta(base, tuned).items()}


@claim(subject=delta, control=lengths, unit="relative difference", seeds=SEEDS)
def kinds_share_out_what_tuning_changed(
    measure: Callable[[nn.Module, nn.Module], dict[str, float]], seed: int
) -> Measured:
    """Over a model tuned everywhere, the squares of all kinds sum to the whole model's, to 1e-6."""
    was, now = base(seed), everywhere(seed)
    pairs = zip(was.parameters(), now.parameters(), strict=True)
    total = sum(float((b - a).detach().double().square().sum()) for a, b in pairs)
    moved = measure(was, now)
    return at_most(abs(sum(moved.values()) / total - 1), 1e-6, o=moved["o"] / total)


def output_alone(model: nn.Module) -> list[str]:
    return ["o"]


def all_but_output(model: nn.Module) -> list[str]:
    """The control: every other kind."""
    return [kind for kind in modules_of(model)[0] if kind != "o"]


@claim(subject=output_alone, control=all_but_output, unit="logits", seeds=SEEDS)
def merging_what_was_tuned_is_the_tuned_model(
    choose: Callable[[nn.Module], list[str]], seed: int
) -> Measured:
    """Where o alone was tuned, nothing else moved and merging o alone gives the tuned model's
    logits bit for bit; merging all else gives the base model's."""
    was, now = base(seed), tuned(seed)
    moved = delta(was, now)
    ids = Talk().batch(0, 64, "test").inputs["input_ids"]
    with torch.no_grad():
        gap = (merge(was, now, choose(was))(ids) - now(ids)).abs().max()
    return at_most(gap + sum(moved[kind] for kind in all_but_output(was)), 0.0, o=moved["o"])


@claim(subject=("o",), control=("q", "k"), unit="accuracy of recall", seeds=SEEDS)
def output_projections_learn_it_alone(kinds: tuple[str, ...], seed: int) -> Measured:
    """Tuning o alone teaches the new answer, 0.85 of recall or more with speech kept; tuning q and
    k, twice as many numbers, does not: where to look was known."""
    recall, speech = answers(tuned(seed, kinds), Talk(8))
    before = answers(base(seed), Talk(8))[0]
    return at_least(recall, 0.85, speech=speech, before=before, chance=1 / HALF)


@claim(subject=("o",), control=("up",), unit="accuracy", seeds=SEEDS)
def without_it_speech_stays(kinds: tuple[str, ...], seed: int) -> Measured:
    """Zero in place of o costs recall 0.7 of accuracy more than speech; in place of the
    feed-forward part's first matrices it costs both."""
    model = tuned(seed)
    recall, speech = answers(model, Talk(8))
    lost_recall, lost_speech = answers(destroy(model, kinds), Talk(8))
    return at_least((recall - lost_recall) - (speech - lost_speech), 0.7, speech=lost_speech)


@claim(
    subject=("o",),
    control=("q",),
    unit="accuracy of recall",
    seeds=SEEDS,
    not_here="Tuned everywhere, a model of one attention spreads the new answer over all matrices, "
    "most of it in the feed-forward parts; no kind brings it alone.",
)
def merging_outputs_of_a_model_tuned_everywhere(kinds: tuple[str, ...], seed: int) -> Measured:
    """The paper's finding: o from a model tuned everywhere brings half of the skill or more."""
    was, now = base(seed), everywhere(seed)
    return at_least(
        recall_of(merge(was, now, kinds)),
        0.5 * recall_of(now),
        attention=recall_of(merge(was, now, ["q", "k", "v", "o"])),
        feed_forward=recall_of(merge(was, now, ["up", "down"])),
    )


@picture
def change_by_module() -> Picture:
    """Share of the squared change in each kind of module, of three models tuned everywhere."""
    found = [delta(base(seed), everywhere(seed)) for seed in SEEDS]
    kinds = list(found[0])
    return Picture(
        title=f"What tuning changed, by module ({', '.join(kinds)})",
        x="module",
        y="share of the squared change",
        lines={
            f"seed {seed}": (
                [float(i) for i in range(len(kinds))],
                [moved[kind] / sum(moved.values()) for kind in kinds],
            )
            for seed, moved in zip(SEEDS, found, strict=True)
        },
    )
