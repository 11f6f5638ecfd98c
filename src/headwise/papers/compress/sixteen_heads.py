"""Most heads can be taken out one by one, and many together.

The paper puts a gate of one on every head of trained models and closes gates. Nearly every head
alone can go without a loss that one would notice, some layers work with a single head, and a fifth
to two fifths of all heads can go at once if they are chosen by how much the loss depends on their
gates: |dL / d gate|, for each example by itself, so that gains and losses do not cancel. One
backward pass gives it for all heads.

The model here is small and trained to recall values of keys; some of its heads are then killed
(their output weights are zero), though their maps are as sharp as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments import ablate_together, ablation
from headwise.instruments.effect_ranks import rank_correlation
from headwise.instruments.metrics import Metric, metric_of
from headwise.models import Site, observe, recording, sites_of, touching, view
from headwise.models.backbones import Decoder
from headwise.models.prefix import logits_of
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Mixer, TokenShift
from headwise.tasks import MultiQueryRecall
from headwise.tasks.task import IGNORED
from headwise.train import fit, seeded

Inputs = dict[str, Tensor]
Head = tuple[int, int]
Scores = dict[Head, float]


@paper(
    title="Are Sixteen Heads Really Better than One?",
    source="arXiv 1905.10650",
    year=2019,
    modality="text",
    plain="How much the loss depends on a head's gate, by example, says which heads can be pruned; "
    "many can.",
    equation=r"I_h = \mathbb{E}_x \left| \mathrm{Att}_h(x)^{\top} "
    r"\frac{\partial L(x)}{\partial \mathrm{Att}_h(x)} \right|",
    parts=("Attention",),
    reported="20 to 40 % of the heads of a translation model and of BERT can go without a "
    "noticeable loss; some layers work with one head.",
    unsure="The normalisation by layer is by the l2 norm of its scores, as in the authors' code.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.compress.sixteen_heads import examples, head_importance, trained

scores = head_importance(trained(0), examples(0))  # (layer, head) -> importance
""",
)
def head_importance(
    model: nn.Module,
    inputs: Inputs,
    metric: str | Metric = "loss",
    by_example: bool = True,
    normalise: bool = True,
) -> Scores:
    """(layer, head) -> mean over examples of |sum over tokens of Att_h . dL/dAtt_h|, the scores of
    a layer divided by their l2 norm."""
    look, wanted = view(model), metric_of(metric)
    places = sites_of(look, "heads")
    given = {key: value for key, value in inputs.items() if key != "labels"}
    with recording(look, places, detach=False) as kept:
        score = wanted.score(logits_of(model(**given)), inputs)
    gradients = torch.autograd.grad(score.sum(), [kept[site] for site in places])
    found: Scores = {}
    for site, gradient in zip(places, gradients, strict=True):
        gate = (kept[site] * gradient).sum((1, 3)).detach()  # (examples, heads)
        importance = gate.abs().mean(0) if by_example else gate.mean(0).abs()
        if normalise:
            importance = importance / importance.norm().clamp_min(1e-12)
        found.update({(site.layer, head): float(one) for head, one in enumerate(importance)})
    return found


def by_signed_mean(
    model: nn.Module,
    inputs: Inputs,
    metric: str | Metric = "loss",
    by_example: bool = False,
    normalise: bool = True,
) -> Scores:
    """The control: gains and losses of examples cancel."""
    return head_importance(model, inputs, metric, False, normalise)


def by_confidence(model: nn.Module, inputs: Inputs) -> Scores:
    """The control: how sharp a head's map is (mean largest weight)."""
    found: Scores = {}
    with (
        torch.no_grad(),
        observe(
            view(model),
            lambda r: found.update(
                {
                    (r.attention.layer, head): float(one)
                    for head, one in enumerate(r.map.max().mean((0, 2)))
                }
            ),
        ),
    ):
        model(inputs["input_ids"])
    return found


def by_chance(model: nn.Module, inputs: Inputs) -> Scores:
    """The control: numbers drawn at random."""
    random = np.random.default_rng(11)
    heads = [(a.layer, head) for a in view(model).attentions for head in range(a.heads)]
    return dict(zip(heads, random.random(len(heads)).tolist(), strict=True))


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
HEADS, DEAD = 8, 4


@cache
def trained(seed: int) -> Decoder:
    """A layer that joins neighbours, then two of eight heads; four heads are killed afterwards."""

    def mixer(layer: int) -> Mixer:
        return Attention(64, HEADS, causal=True) if layer else TokenShift(64, causal=True)

    task = MultiQueryRecall(pairs=4, length=32, vocabulary=32, power=1.0)
    with seeded(seed):
        model = Decoder(32, 64, 3, mixer, feed=lambda layer: None, tied=False)
    fit(model, task, steps=120, size=32, rate=5e-3, seed=seed)
    with torch.no_grad():
        for layer, head in dead(seed):
            view(model).attentions[layer - 1].output_weight()[head] = 0.0
    return model.eval()


def dead(seed: int) -> set[Head]:
    """Two heads of each layer."""
    random = np.random.default_rng(seed)
    return {(layer, int(h)) for layer in (1, 2) for h in random.permutation(HEADS)[: DEAD // 2]}


def examples(seed: int, count: int = 64) -> Inputs:
    task = MultiQueryRecall(pairs=4, length=32, vocabulary=32, power=1.0)
    batch = task.batch(100 + seed, count, "test")
    # a label stands where its token would: one place behind the position that predicts it
    labels = torch.full_like(batch.targets, IGNORED)
    labels[:, 1:] = batch.targets[:, :-1]
    return {**batch.inputs, "labels": labels}


@claim(control=by_signed_mean, unit="largest relative difference", seeds=SEEDS)
def importance_is_the_gates_gradient(score: Callable[..., Scores], seed: int) -> Measured:
    """Against gates of one on every head and a backward pass for each example, to 1e-4; gains and
    losses that cancel are something else."""
    model, given = trained(seed), examples(seed, 8)
    found = score(model, given, normalise=False)
    look, loss = view(model), metric_of("loss")
    want = dict.fromkeys(found, 0.0)
    for row in range(8):
        one = {key: value[row : row + 1] for key, value in given.items()}
        gates = {layer: torch.ones(HEADS, requires_grad=True) for layer in (1, 2)}
        writes = {
            Site("heads", layer): lambda out, gate=gate: out * gate[:, None]
            for layer, gate in gates.items()
        }
        with touching(look, writes):
            loss.score(model(one["input_ids"]), one).sum().backward()
        for layer, gate in gates.items():
            assert gate.grad is not None
            for head in range(HEADS):
                want[layer, head] += abs(float(gate.grad[head])) / 8
    largest = max(want.values())
    return at_most(max(abs(found[head] - want[head]) for head in want) / largest, 1e-4)


@claim(control=by_confidence, unit="share of dead heads among the lowest", seeds=SEEDS)
def dead_heads_come_last(score: Callable[..., Scores], seed: int) -> Measured:
    """The four dead heads are the four of least importance; their maps do not tell."""
    found = score(trained(seed), examples(seed))
    lowest = set(sorted(found, key=found.__getitem__)[:DEAD])
    return at_least(len(lowest & dead(seed)) / DEAD, 1.0)


@claim(control=by_chance, unit="Spearman correlation", seeds=SEEDS)
def importance_goes_with_what_is_lost(score: Callable[..., Scores], seed: int) -> Measured:
    """Rank correlation with the exact effect of every head by itself (leave one out) of 0.5 or more
    (0.6 was asked of a larger model; heads of this one stand in for each other)."""
    given = examples(seed)
    exact = ablation(trained(seed), given, "loss")
    found = score(trained(seed), given)
    heads = zip(exact.heads["layer"], exact.heads["head"], strict=True)
    mine = np.array([found[int(a), int(b)] for a, b in heads])
    return at_least(rank_correlation(mine, np.array(exact.heads["effect"])), 0.5)


def _loss_without(model: nn.Module, given: Inputs, heads: list[Head]) -> float:
    return float(ablate_together(model, given, [heads], "loss").mean[0])


@claim(control=by_chance, unit="ratio of the rise in loss", seeds=SEEDS)
def half_of_the_heads_can_go(score: Callable[..., Scores], seed: int) -> Measured:
    """Without the half of the heads that matters least the loss rises by at most half of what it
    rises without a random half (mean of five draws)."""
    model, given = trained(seed), examples(seed)
    found = score(model, given)
    lowest = sorted(found, key=found.__getitem__)[: len(found) // 2]
    random = np.random.default_rng(seed)
    heads = list(found)
    drawn = [
        _loss_without(
            model, given, [heads[n] for n in random.permutation(len(heads))[: len(lowest)]]
        )
        for _ in range(5)
    ]
    chosen = _loss_without(model, given, lowest)
    return at_most(chosen / float(np.mean(drawn)), 0.5, chosen=chosen, random=float(np.mean(drawn)))


@picture
def loss_by_heads_removed() -> Picture:
    """Rise of the loss as heads go, in order of importance and of confidence."""
    model, given = trained(0), examples(0)
    orders = {"by importance": head_importance(model, given), "by confidence": by_confidence(
        model, given)}  # fmt: skip
    counts = list(range(0, 2 * HEADS, 2))
    lines = {}
    for name, scores in orders.items():
        order = sorted(scores, key=scores.__getitem__)
        rises = ablate_together(model, given, [order[:n] for n in counts], "loss").mean
        lines[name] = (counts, rises.tolist())
    return Picture(
        title="Loss without heads", x="heads removed", y="rise of the loss, nats", lines=lines
    )
