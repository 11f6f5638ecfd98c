"""How deep in a model a concept can first be read off.

A linear probe at every layer tells whether a yes-or-no concept can be read off the last token
there. What is simple can be read early, what has to be put together only further up: the depth at
which the probe's score jumps, and the one from which it stays, place concepts on one scale of
difficulty. The paper compares facts, emotions and inferences in language models, and shows that
noise in the input and coarse weights push concepts up.

The concepts here are of known difficulty. The input is a table of arrows, each one token, and a
question: where does one arrow (or where do two) lead from this node? The node asked for is in the
last token, the node after one arrow takes one attention, the node after two takes two.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments import Probe, probe
from headwise.instruments.concept_depth import converging_point, jump_point
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, claim, paper, picture
from headwise.parts import Attention
from headwise.tasks import Batch, Task
from headwise.train import fit, seeded


@paper(
    title="Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different "
    "Layers?",
    source="arXiv 2404.07066",
    year=2024,
    modality="text",
    plain="A linear probe at every layer says how deep in a model a concept can first be read off; "
    "harder concepts appear further up.",
    equation=r"J = \min\{\, i/d : \alpha_i / \alpha_{i-1} \ge 1.1 \,\}, \quad "
    r"C = \max\{\, i/d : |\alpha_i / \alpha_{i-1} - 1| < 0.03 \,\}",
    parts=("probe", "jump_point", "converging_point"),
    reported="In Gemma, LLaMA and Qwen facts and emotions converge in lower layers than "
    "inferences; noise and 8-bit weights slow convergence.",
    unsure="The concepts are synthetic, and the model, of attention alone, is trained on them; the "
    "paper probes language models that were not. J and C are as we recall them. J does not tell "
    "one arrow from two here (the first attention brings both above 1.1 times the embedding's "
    "score), and C is always the top after a plateau: claims rest on the first layer with a score "
    "of 0.9. With feed-forward layers one layer is enough for two arrows on so small a table.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.instruments.concept_depth import jump_point
from headwise.papers.lens.concept_depth import Arrows, concept_scores
from headwise.models.backbones import Decoder
from headwise.parts import Attention

task = Arrows()
model = Decoder(task.vocabulary, 32, 3, mixer=lambda layer: Attention(32, 4, causal=True))
depth = jump_point(concept_scores(model, "one arrow").score)
""",
)
def concept_scores(model: nn.Module, concept: str, examples: int = 400, seed: int = 0) -> Probe:
    """Scores by layer of "node", "one arrow" or "two arrows": whether the node asked for, or the
    one that is reached from it, is in the upper half; on questions for two arrows.

    The probe is an L2 logistic regression at the last token, cross-validated, as in the paper.
    """
    task = Arrows()
    batch = task.batch(0, 3 * examples, "test")
    asked = (batch.facts["arrows"] == 2).nonzero()[:examples, 0]
    labels = (batch.facts[concept][asked] >= task.nodes // 2).long()
    return probe(model, batch.inputs["input_ids"][asked], labels, controls=(), folds=4, seed=seed)


HEADS = 4
CONCEPTS = ("node", "one arrow", "two arrows")


class Arrows(Task):
    """`nodes` tokens that say where an arrow leads, one from each node, in random order; then a
    token that asks for the node that one, or two, arrows lead to. No position is needed. Chance:
    1 / nodes; two arrows take two attentions, one after the other."""

    def __init__(self, nodes: int = 4, seed: int = 0) -> None:
        self.nodes, self.seed = nodes, seed
        self.vocabulary = nodes * nodes + 2 * nodes

    def make(self, size: int, generator: torch.Generator) -> Batch:
        m = self.nodes
        leads = torch.randint(m, (size, m), generator=generator)
        order = torch.rand(size, m, generator=generator).argsort(1)
        node = torch.randint(m, (size,), generator=generator)
        arrows = torch.randint(1, 3, (size,), generator=generator)
        one = leads.gather(1, node[:, None])
        two = leads.gather(1, one)
        question = m * m + (arrows - 1) * m + node
        ids = torch.cat([order * m + leads.gather(1, order), question[:, None]], 1)
        targets = torch.full_like(ids, -100)
        targets[:, -1] = torch.where(arrows == 1, one[:, 0], two[:, 0])
        facts = {"node": node, "one arrow": one[:, 0], "two arrows": two[:, 0], "arrows": arrows}
        return Batch({"input_ids": ids}, targets, facts)


def untrained(seed: int) -> nn.Module:
    """The control: the same model, as it was drawn."""
    with seeded(seed):
        made: nn.Module = Decoder(
            Arrows().vocabulary,
            64,
            4,
            mixer=lambda layer: Attention(64, HEADS, causal=True),
            feed=lambda layer: None,
        )
    return made.eval()


@cache
def trained(seed: int) -> nn.Module:
    """A decoder of four layers that answers both questions."""
    model = untrained(seed)
    fit(model, Arrows(), steps=900, size=64, rate=3e-3, seed=seed, target=0.02)
    return model.eval()


@cache
def _scores(make: Any, seed: int) -> dict[str, np.ndarray]:
    model = make(seed)
    return {name: concept_scores(model, name, seed=seed).score for name in CONCEPTS}


def _reached(scores: np.ndarray, wanted: float = 0.9) -> int:
    """The first layer with this score; one past the last where none has."""
    found = np.flatnonzero(scores >= wanted)
    return int(found[0]) if len(found) else len(scores)


SEEDS = (0, 1)


@claim(subject=trained, control=untrained, unit="layers", seeds=SEEDS, quick=False)
def harder_concepts_are_read_further_up(make: Any, seed: int) -> Measured:
    """The node reaches a score of 0.9 before one arrow, and one arrow before two: the smaller of
    the two gaps is at least one layer. Drawn at random (control), no layer has the arrows."""
    scores = _scores(make, seed)
    node, one, two = (_reached(scores[name]) for name in CONCEPTS)
    return at_least(min(one - node, two - one), 1, node=node, one=one, two=two)


@claim(subject=trained, control=untrained, unit="accuracy", seeds=SEEDS, quick=False)
def two_arrows_are_put_together_inside(make: Any, seed: int) -> Measured:
    """A probe gains at least 0.3 on two arrows from the embedding to the best layer."""
    scores = _scores(make, seed)["two arrows"]
    jump, end = jump_point(scores) or 0.0, converging_point(scores) or 0.0
    return at_least(scores.max() - scores[0], 0.3, embedding=scores[0], jump=jump, converged=end)


def coarse(bits: int, seed: int) -> nn.Module:
    """The trained model with every matrix rounded to 2^bits levels, evenly from -max to max."""
    model = copy.deepcopy(trained(seed))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(rounded(weight, bits))
    return model


def rounded(weight: Tensor, bits: int) -> Tensor:
    step = weight.abs().max() / (2 ** (bits - 1) - 0.5)
    return (weight / step).round() * step


@claim(subject=2, control=8, unit="accuracy", seeds=SEEDS, quick=False)
def coarse_weights_blur_what_is_put_together(bits: Any, seed: int) -> Measured:
    """Weights of 2 bits cost two arrows at least 0.05 of their best score; 8 bits (control) cost
    nothing, while the paper sees them slow convergence in models of billions."""
    before = _scores(trained, seed)["two arrows"]
    after = concept_scores(coarse(bits, seed), "two arrows", seed=seed).score
    return at_least(before.max() - after.max(), 0.05, best=after.max())


@picture
def by_layer() -> Picture:
    """The three concepts by layer, trained and not."""
    lines = {}
    for name, make in (("", trained), (", untrained", untrained)):
        scores = _scores(make, 0)
        for concept in CONCEPTS if make is trained else CONCEPTS[2:]:
            lines[concept + name] = (list(range(5)), scores[concept].tolist())
    return Picture(
        title="What a linear probe reads off the last token",
        x="layers behind it",
        y="accuracy",
        lines=lines,
    )
