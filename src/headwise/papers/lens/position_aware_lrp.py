"""Relevance for where a token stands, beside what it is.

Layer-wise relevance propagation hands the score of an answer back through a network, layer by
layer, so that what arrives at the inputs adds up to the score. In transformers it did not add up:
what came to a positional encoding was dropped. Here an input is a pair of a token and its position,
and both are inputs: a sum of token and position is shared out like every sum, a rotation like every
product, half to the angles, which collect it over all heads and layers. A token's score is then the
relevance of the pair.

The rules of AttnLRP and the positions that receive relevance are the instrument's
(`headwise.instruments.relevance_propagation`); the models below are ones whose answer is a place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.attribution import attribute
from headwise.instruments.examples import model_view
from headwise.instruments.perturbation import perturb
from headwise.instruments.relevance_propagation import Relevance, lrp, pa_lrp, propagate
from headwise.instruments.targets import LogitOf
from headwise.models import view
from headwise.models.backbones import Encoder
from headwise.models.heads import Classify
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, Position, Rotary
from headwise.parts.position.absolute import Learned
from headwise.tasks.task import Batch, Task
from headwise.train import fit, seeded

Inputs = dict[str, Tensor]


@paper(
    title="Revisiting LRP: Positional Attribution as the Missing Ingredient for Transformer "
    "Explainability",
    source="arXiv 2506.02138",
    year=2025,
    modality="any",
    plain="Relevance that reaches a positional encoding stays with the position, so that tokens "
    "and positions together add up to the score.",
    equation=r"R_{e} = e \odot g, \quad R_{p} = p \odot g \ (x = e + p), \qquad "
    r"R_{\theta} = \tfrac12 \sum_{h,l} (\cos, \sin) \odot g",
    parts=("Attention", "Learned", "Rotary"),
    reported="DeiT and fine-tuned LLaMA: better deletion and segmentation than AttnLRP without "
    "positions.",
    unsure="How the two maps are put together for heat maps: the published code divides each by "
    "its largest number first, and for LLaMA takes absolute values of the positions'. Here they "
    "are added as they are, which is what conserves.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.lens.position_aware_lrp import batch, position_aware_lrp, trained

asked = batch(4)
found = position_aware_lrp(trained(0), asked.inputs, asked.targets)
found.tokens, found.positions, found.lost  # (batch, n), (batch, n), (batch,)
""",
)
def position_aware_lrp(model: nn.Module, inputs: Inputs, target: Any, **rules: Any) -> Relevance:
    """Relevance of the logits `target` `(batch,)`, of tokens and of positions. `rules`: those of
    `propagate` (maps, epsilon, gamma)."""
    return propagate(model_view(model), inputs, LogitOf(target), positions=True, **rules)


# -- a model whose answer is a place ---------------------------------------------------------------

LENGTH, VOCABULARY, DIM = 16, 20, 32


class WhereIsIt(Task):
    """`<cls>` and 15 tokens, one of them a marker: where does it stand? Chance 1 in 15."""

    vocabulary = VOCABULARY

    def make(self, size: int, generator: torch.Generator) -> Batch:
        ids = torch.randint(2, VOCABULARY, (size, LENGTH), generator=generator)
        at = torch.randint(1, LENGTH, (size,), generator=generator)
        ids[:, 0] = 0
        ids[torch.arange(size), at] = 1
        return Batch({"input_ids": ids}, at - 1, {"at": at})


def encoder(seed: int, position: Position) -> Encoder:
    with seeded(seed):
        return Encoder(
            VOCABULARY,
            DIM,
            1,
            lambda layer: Attention(DIM, 4, position=position),
            head=Classify(DIM, LENGTH - 1, pool="first"),
        )


@cache
def trained(seed: int) -> Encoder:
    model = encoder(seed, Learned(LENGTH))
    fit(model, WhereIsIt(), steps=400, size=64, rate=5e-3, seed=seed)
    return model.eval()


def batch(size: int = 200) -> Batch:
    return WhereIsIt().batch(0, size, "test")


@torch.no_grad()
def without_biases(seed: int, position: Position) -> Encoder:
    """A model of larger random weights, in which nothing but inputs can receive relevance."""
    model = encoder(seed, position).double().eval()
    with seeded(seed):
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


# -- what it comes to ------------------------------------------------------------------------------


def both(found: Relevance) -> Tensor:
    return found.total


def tokens_alone(found: Relevance) -> Tensor:
    """The control: relevance as it was, what comes to positions is dropped."""
    return found.tokens


@claim(subject=both, control=tokens_alone, unit="share of the score", seeds=(0, 1, 2))
def tokens_and_positions_are_the_score(read: Callable[[Relevance], Tensor], seed: int) -> Measured:
    """Without biases, and attention weights as constants (the softmax of AttnLRP has a bias of its
    own that takes relevance), tokens and learned positions together miss less than 0.1 % of the
    score; tokens alone miss more."""
    model, asked = without_biases(seed, Learned(LENGTH)), batch(50)
    found = position_aware_lrp(model, asked.inputs, asked.targets, maps="constant")
    lost = (found.score - read(found).sum(1)).abs().sum()
    return at_most(lost / found.score.abs().sum(), 1e-3)


@claim(subject=both, control=tokens_alone, unit="share of the largest relevance", seeds=(0, 1, 2))
def angles_take_what_tokens_leave(read: Callable[[Relevance], Tensor], seed: int) -> Measured:
    """Rotary positions, place by place: what goes to angles is what tokens had when the angles were
    constants, and nothing is made or lost at the rotation."""
    model, asked = without_biases(seed, Rotary()), batch(50)
    plain = lrp(view(model), asked.inputs, LogitOf(asked.targets))
    found = position_aware_lrp(model, asked.inputs, asked.targets)
    return at_most((read(found) - plain).abs().max() / plain.abs().max(), 1e-6)


@torch.no_grad()
def table_of_zeros(seed: int) -> Encoder:
    model = without_biases(seed, Learned(LENGTH))
    model.stack.mixers[0].position.table.zero_()
    return model


def table(seed: int) -> Encoder:
    """The control: positions that say something."""
    return without_biases(seed, Learned(LENGTH))


@claim(subject=table_of_zeros, control=table, unit="share of the largest relevance")
def without_positions_it_is_attnlrp(make: Callable[[int], Encoder], seed: int) -> Measured:
    """Where positions are zero, nothing is different from AttnLRP without them."""
    model, asked = make(seed), batch(50)
    plain = lrp(view(model), asked.inputs, LogitOf(asked.targets))
    found = position_aware_lrp(model, asked.inputs, asked.targets).total
    return at_most((found - plain).abs().max() / plain.abs().max(), 1e-9)


SEEDS = (0, 1, 2)


@claim(subject=pa_lrp, control=lrp, unit="share of inputs", seeds=SEEDS, quick=False)
def the_decisive_place_comes_first(method: Any, seed: int) -> Measured:
    """Where the answer is the marker's place, the marker has the highest relevance in 90 % of
    inputs or more; by its token alone it has not, though the model answers right."""
    model, asked = trained(seed), batch()
    scores = method(view(model), asked.inputs, LogitOf(asked.targets))
    with torch.no_grad():
        right = torch.eq(model(**asked.inputs).argmax(-1), asked.targets).float().mean()
    hit = torch.eq(scores.argmax(-1), asked.facts["at"]).float().mean()
    return at_least(hit, 0.9, accuracy=right, chance=1 / LENGTH)


@claim(subject=pa_lrp, control=lrp, unit="probability", seeds=SEEDS, quick=False)
def deletion_falls_earlier(method: Any, seed: int) -> Measured:
    """Hiding positions in this order lowers the mean probability of the answer by 0.05 or more
    against the order of the tokens' relevance."""
    model, asked = trained(seed), batch(100)
    given: dict[str, Any] = {"inputs": asked.inputs, "target": asked.targets}
    orders = {
        "method": attribute(model, method=method, **given),
        "tokens": attribute(model, method=lrp, **given),
    }
    curves = perturb(
        model, asked.inputs, orders, asked.targets, instead="hide", steps=LENGTH - 1, orders=1
    )
    gain = curves.gain("method", over="tokens")
    return at_least(gain.mean, 0.05, error=gain.error, random=curves.gain("method").mean)


@picture
def tokens_and_positions() -> Picture:
    """One input of the task: relevance of tokens, and of positions."""
    asked = batch(1)
    found = position_aware_lrp(trained(0), asked.inputs, asked.targets)
    assert found.positions is not None
    places = list(range(LENGTH))
    return Picture(
        title=f"Where is the marker? It stands at {int(asked.facts['at'][0])}",
        x="position",
        y="relevance (logits)",
        lines={
            "tokens": (places, found.tokens[0].tolist()),
            "positions": (places, found.positions[0].tolist()),
        },
    )
