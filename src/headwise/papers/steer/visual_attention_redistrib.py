"""Attention that multimodal models waste on a few image patches, given to the other patches.

In multimodal language models a few visual tokens draw attention whatever is asked, and say nothing
about it. The paper finds that they carry massive activations in the very dimensions in which the
first token does, so that they can be told from the residual stream alone, and that leaving them out
costs nothing. Their weight is a budget: in heads that otherwise look at the image, for text
queries, a share of it goes to the visual tokens that are no sinks, in proportion.

The model here is planted: four of 24 visual tokens are sinks, one shows an object, and a text token
suggests an answer that is mostly wrong. Half of the objects are faint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import swap
from headwise.edits.change import Call, Change
from headwise.edits.reweighing import mass_on, moved_mass
from headwise.edits.token_sets import among_keys, among_queries
from headwise.maps import KeyMask
from headwise.models import Site, observe, recording, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, at_least, at_most, claim, paper
from headwise.parts import Attention
from headwise.train import seeded

Inputs = dict[str, Tensor]
FindSinks = Callable[[nn.Module, Inputs, Tensor], dict[int, Tensor]]


@torch.no_grad()
def visual_sinks(
    model: nn.Module, inputs: Inputs, visual: Tensor, threshold: float = 20.0
) -> dict[int, Tensor]:
    """layer -> which visual tokens are sinks `(batch, n)`: those with |x_d| / rms(x) above the
    threshold in a dimension d in which the first token has it, in the residual the layer reads."""
    look = view(model)
    wanted = [Site("residual", layer.index) for layer in look.layers]
    with recording(look, wanted) as kept:
        model(**inputs)
    found = {}
    for site in wanted:
        x = kept[site]
        size = x.abs() / x.pow(2).mean(-1, keepdim=True).sqrt()
        massive = size[:, :1] >= threshold
        found[site.layer] = visual & (size.masked_fill(~massive, 0.0).amax(-1) >= threshold)
    return found


class Redistribute(Change):
    """In rows of text that look at the image, `share` of what sinks hold goes to the visual tokens
    that are no sinks.

    visual, sinks: `(batch, n)`. A row looks at the image where at least `least` of its weight is
    on visual tokens, and `ratio` of that on those that are no sinks.
    """

    def __init__(
        self,
        visual: Tensor,
        sinks: Tensor,
        share: float = 0.6,
        ratio: float = 0.5,
        least: float = 0.2,
    ) -> None:
        self.visual, self.sinks = visual, sinks
        self.share, self.ratio, self.least = share, ratio, least

    def before(self, call: Call) -> Call:
        source = among_keys(self.sinks, call)[:, None]
        to = among_keys(self.visual & ~self.sinks, call)[:, None]
        wasted, useful = mass_on(call, source), mass_on(call, to)
        on_image = wasted + useful
        looks = (on_image >= self.least) & (useful >= self.ratio * on_image)
        text = ~among_queries(self.visual, call)[:, None]
        return moved_mass(call, source, to, self.share, looks & text)


@paper(
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    source="arXiv 2503.03321",
    year=2025,
    modality="multimodal",
    plain="Visual tokens with massive activations hold attention for nothing; in heads that look "
    "at the image it is given to the other visual tokens.",
    equation=r"\phi(x) = \max_{d \in D_{\mathrm{sink}}} \frac{|x_d|}{\mathrm{rms}(x)} \ge \tau, "
    r"\qquad a_j \leftarrow a_j + p \sum_{s} a_s \frac{a_j}{\sum_{j'} a_{j'}}",
    parts=("Attention",),
    reported="Better answers of LLaVA-1.5 and other models on vision-language, hallucination and "
    "vision-centric benchmarks, without training.",
    unsure="The least visual attention of a head that counts as looking at the image.",
    taxonomy=("beyond/analysis",),
    use="""
import headwise
from headwise.papers.steer.visual_attention_redistrib import (
    VISUAL, examples, planted, redistribution
)

model, (given, answers) = planted(), examples(0, 8)
with headwise.swap(model, redistribution(model, given, VISUAL)):
    model(**given)
""",
)
def redistribution(
    model: nn.Module,
    inputs: Inputs,
    visual: Tensor,
    share: float = 0.6,
    find: FindSinks = visual_sinks,
) -> dict[Any, Change]:
    """What `headwise.swap` takes for these inputs: every layer but the last."""
    sinks = find(model, inputs, visual)
    return {
        layer: Redistribute(visual.expand_as(found), found, share)
        for layer, found in sinks.items()
        if layer < max(sinks)
    }


# -- a model in which the truth is known ----------------------------------------------------------

DIM, HEADS, PATCHES, CLASSES = 512, 8, 24, 4
LENGTH = PATCHES + 3
VISUAL = torch.tensor([False] + [True] * PATCHES + [False] * 2)
MASSIVE, OBJECT, SUGGESTS, ASKS = range(4)
FIRST, ASK, SINK, PLAIN = 0, 9, 10, 11
"""Numbers of tokens: the first, objects 1 to 4, suggestions 5 to 8, the question, sinks, plain
patches 11 to 15, faint objects 16 to 19."""


@cache
@torch.no_grad()
def planted() -> Decoder:
    """Heads 0 to 4 of the first layer look at the image, 5 to 7 at the suggestion."""
    with seeded(0):
        model = Decoder(
            20,
            DIM,
            2,
            lambda layer: Attention(DIM, HEADS, causal=True),
            feed=lambda layer: None,
            norm=nn.RMSNorm,
            tied=False,
        ).eval()
    look = view(model)
    table, read = look.embedding, look.unembedding
    assert table is not None
    assert read is not None
    random = torch.Generator().manual_seed(0)
    table.copy_(0.01 * torch.randn(table.shape, generator=random))
    table[:, :64] = 0.0
    table[FIRST, MASSIVE] = table[SINK, MASSIVE] = 60.0
    table[ASK, ASKS] = 1.0
    table[PLAIN : PLAIN + 5, 64:80] = torch.randn(5, 16, generator=random)
    for c in range(CLASSES):
        for token, feature in ((1 + c, OBJECT), (5 + c, SUGGESTS), (16 + c, OBJECT)):
            # faint objects say something else as well, so that the norm leaves as much of the class
            table[token, feature], table[token, 4 + c] = (0.67 if token > 15 else 1.0), 1.0
            table[token, 80] = 0.74 if token > 15 else 0.0
    for attention in look.attentions:
        for weight in (
            attention.query_weight(),
            attention.key_weight(),
            attention.value_weight(),
            attention.output_weight(),
        ):
            weight.zero_()
    first = look.attentions[0]
    size = DIM**0.5  # of a feature that stands alone, behind the norm; 0.7 of it beside another
    scale = first.head_dim**-0.5
    for head in range(HEADS):
        sees = head < 5
        first.query_weight()[head, 0, ASKS] = 1.0
        key = first.key_weight()[head, 0]
        key[MASSIVE] = (2.0 if sees else -4.0) / (size * size * scale)
        key[OBJECT if sees else SUGGESTS] = (4.5 if sees else 3.5) / (0.7 * size * size * scale)
        first.value_weight()[head, :4, 4:8] = torch.eye(4)
        first.output_weight()[head, 28:32, :4] = torch.eye(4)
    read.zero_()
    read[1 : 1 + CLASSES, 28:32] = torch.eye(4)
    return model


def examples(seed: int, count: int = 200) -> tuple[Inputs, Tensor]:
    """First token, 24 patches (4 sinks, 1 object, faint in half of the cases, else plain), a
    suggestion drawn at random, the question; and the object's class."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(PLAIN, PLAIN + 5, (count, LENGTH), generator=random)
    place = torch.rand(count, PATCHES, generator=random).argsort(1)[:, :5] + 1
    kind = torch.randint(0, CLASSES, (count,), generator=random)
    faint = torch.arange(count) % 2 == 0
    ids.scatter_(1, place[:, :4], SINK)
    ids.scatter_(1, place[:, 4:], torch.where(faint, kind + 16, kind + 1)[:, None])
    ids[:, 0], ids[:, -1] = FIRST, ASK
    ids[:, -2] = torch.randint(5, 5 + CLASSES, (count,), generator=random)
    return {"input_ids": ids}, kind


def most_attended(model: nn.Module, inputs: Inputs, visual: Tensor) -> dict[int, Tensor]:
    """The control: the four visual tokens on which the question's heads put most."""
    kept: list[Tensor] = []

    def read(reading: Any) -> None:
        kept.append(reading.map.rows(torch.tensor([LENGTH - 1]))[:, :, 0].mean(1))

    with torch.no_grad(), observe(view(model), read):
        model(**inputs)
    found = {}
    for layer, weight in enumerate(kept):
        top = weight.masked_fill(~visual, -1.0).topk(4, dim=-1).indices
        found[layer] = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, top, True)
    return found


def at_random(model: nn.Module, inputs: Inputs, visual: Tensor) -> dict[int, Tensor]:
    """The control: four visual tokens drawn at random."""
    ids = inputs["input_ids"]
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    top = order.masked_fill(~visual, -1.0).topk(4, dim=-1).indices
    chosen = torch.zeros(ids.shape, dtype=torch.bool).scatter_(1, top, True)
    return {0: chosen, 1: chosen}


# -- claims ---------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


@claim(subject=visual_sinks, control=most_attended, unit="F1", seeds=SEEDS)
def massive_activations_tell_sinks(find: FindSinks, seed: int) -> Measured:
    """Precision and recall of the found tokens are 1; going by attention names objects too."""
    given, _ = examples(seed)
    found, truth = find(planted(), given, VISUAL)[0], given["input_ids"] == SINK
    hits = float((found & truth).sum())
    return at_least(2 * hits / float(found.sum() + truth.sum()), 1.0)


@claim(subject=visual_sinks, control=at_random, unit="largest difference", seeds=SEEDS)
def weights_move_as_written(find: FindSinks, seed: int) -> Measured:
    """Against the written-out form on every map: in rows that look at the image sinks keep 0.4 of
    their weight and the other patches share the rest in proportion; all else stays, to 1e-5."""
    given, _ = examples(seed, 16)
    model, truth = planted(), given["input_ids"] == SINK
    before = _maps(model, given, {})
    after = _maps(model, given, redistribution(model, given, VISUAL, find=find))
    sinks, others = truth[:, None, None], (VISUAL & ~truth)[:, None, None]
    wasted = (before * sinks).sum(-1, keepdim=True)
    useful = (before * others).sum(-1, keepdim=True)
    looks = (wasted + useful >= 0.2) & (useful >= 0.5 * (wasted + useful)) & (wasted > 0)
    looks = looks & ~VISUAL[:, None]
    factor = torch.where(sinks, 0.4, torch.where(others, 1 + 0.6 * wasted / useful, 1.0))
    return at_most((after - torch.where(looks, before * factor, before)).abs().max(), 1e-5)


@torch.no_grad()
def _maps(model: nn.Module, given: Inputs, changes: dict[Any, Change]) -> Tensor:
    kept: list[Tensor] = []
    with observe(view(model), lambda r: kept.append(r.map.dense())), swap(model, changes):
        model(**given)
    return kept[0]


@torch.no_grad()
def _accuracy(seed: int, changes: dict[Any, Any], faint: bool | None = None) -> float:
    given, kind = examples(seed)
    with swap(planted(), changes):
        answer = planted()(**given)[:, -1, 1 : 1 + CLASSES].argmax(-1)
    hits = (answer == kind).float()
    return float((hits if faint is None else hits[0 if faint else 1 :: 2]).mean())


@claim(subject=visual_sinks, control=at_random, unit="points of accuracy", seeds=SEEDS)
def sinks_can_be_left_out(find: FindSinks, seed: int) -> Measured:
    """Hiding the sinks from everybody costs no point of accuracy on clear objects; hiding as many
    patches at random does."""
    given, _ = examples(seed)
    hidden = KeyMask(~find(planted(), given, VISUAL)[0])
    loss = _accuracy(seed, {}, faint=False) - _accuracy(seed, {"all": hidden}, faint=False)
    return at_most(100 * loss, 1.0)


@claim(subject=visual_sinks, control=at_random, unit="points of accuracy", seeds=SEEDS)
def faint_objects_are_seen(find: FindSinks, seed: int) -> Measured:
    """Accuracy on faint objects rises by 5 points or more."""
    given, _ = examples(seed)
    before = _accuracy(seed, {}, faint=True)
    after = _accuracy(seed, redistribution(planted(), given, VISUAL, find=find), faint=True)
    return at_least(100 * (after - before), 5.0, before=before, after=after, chance=1 / CLASSES)
