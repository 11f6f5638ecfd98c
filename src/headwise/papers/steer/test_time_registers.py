"""Registers without training: a place beside the image for what a few neurons write.

Large vision transformers turn some patches that say little into outliers of huge norm, and heads
park their attention there; attention maps are then spotted, and the patch itself is lost. Models
trained with register tokens put the outliers there instead. The paper finds that a handful of
neurons write all of it, the same ones on every image. So one may find them, append one token of
nothing when the model runs, let these neurons write on that token and not on patches, and train
nothing: heads find their sink where it harms no patch. Merely silencing the neurons takes the sink
away, and the heads then read what they were not to read.

The transformer here is planted: three neurons write a vector of norm 100 on background patches, the
class token's heads look for it, and values there are nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.edits import Neuron, Registers, find_register_neurons
from headwise.models import ModelView, Site, recording, touching, view
from headwise.models.backbones.stack import Stack
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention
from headwise.train import seeded

DIM, DEPTH, HEADS, PATCHES = 64, 3, 4, 36
NORM = 100.0
PLANTED = {Neuron(0, 17), Neuron(0, 101), Neuron(0, 200)}
BACKGROUND, OUTLIER, CLASS = 0, 1, 2
"""Features of the residual: says background, is written by the three neurons, says class token."""


@paper(
    title="Vision Transformers Don't Need Trained Registers",
    source="arXiv 2506.08010",
    year=2025,
    modality="image",
    plain="A few neurons write the outlier tokens of vision transformers; at run time they can be "
    "made to write on an appended empty token instead of on patches.",
    equation=r"a_{\mathrm{reg}} = \max_{p \in \mathrm{patches}} a_p, \qquad "
    r"a_p \leftarrow 0 \quad \text{for each register neuron } a",
    parts=("Attention",),
    reported="OpenCLIP and DINOv2 with test-time registers match models trained with registers in "
    "classification, segmentation and unsupervised object discovery.",
    unsure="The authors' code takes the maximum over all tokens, the class token included; the "
    "paper says patches, and so do we.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.edits import Registers
from headwise.papers.steer.test_time_registers import images, planted, registers

with registers(planted(0)):
    features = planted(0)(images(0, 2))
""",
)
def registers(model: nn.Module, count: int = 3) -> Registers:
    """The model with one test-time register, on the `count` neurons that the search finds."""
    return Registers(model, find_register_neurons(model, batches(), count, threshold=NORM / 2))


class Transformer(nn.Module):
    """Patches `(batch, n, DIM)` to features of the class token `(batch, DIM)`."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(DIM))
        self.stack = Stack(DIM, DEPTH, mixer=lambda layer: Attention(DIM, HEADS))

    def forward(self, pixel_values: Tensor) -> Tensor:
        start = self.start.expand(len(pixel_values), 1, -1)
        done: Tensor = self.stack(torch.cat([start, pixel_values], 1))
        return done[:, 0]


@cache
@torch.no_grad()
def planted(seed: int) -> Transformer:
    """Random weights, but for three neurons of the first layer and the sink of the later ones."""
    with seeded(seed):
        model = Transformer().eval()
    model.start[CLASS] = 4.0
    look = view(model)
    for attention in look.attentions:
        for weight in (attention.value_weight(), attention.query_weight(), attention.key_weight()):
            weight[..., :3] = 0.0
        attention.output_weight()[:, :3] = 0.0
        if attention.layer > 0:  # logits of about 8 from the class token to outliers
            attention.query_weight()[:, 0, CLASS] = 1.0
            attention.key_weight()[:, 0, OUTLIER] = 0.5 * attention.head_dim**0.5
    feed: Any = model.stack.feeds[0]
    for neuron in PLANTED:
        feed.up.weight[neuron.index] = 0.0
        feed.up.weight[neuron.index, BACKGROUND] = 2.0
        feed.up.bias[neuron.index] = -4.0
        feed.down.weight[:, neuron.index] = 0.0
        # a background patch reads sqrt(DIM) behind the norm where it says nothing else
        feed.down.weight[OUTLIER, neuron.index] = NORM / 3 / 8.0
    return model


def images(seed: int, count: int = 100) -> Tensor:
    """Random patches; a sixth of them background, which says hardly anything else."""
    random = torch.Generator().manual_seed(seed)
    made = torch.randn(count, PATCHES, DIM, generator=random)
    made[..., :3] = 0.0
    empty = torch.rand(count, PATCHES, generator=random).argsort(1) < PATCHES // 6
    made[empty] *= 0.1
    made[..., BACKGROUND] = 4.0 * empty
    return made


def batches() -> list[dict[str, Tensor]]:
    return [{"pixel_values": images(1000 + part, 25)} for part in range(4)]


def nothing(model: nn.Module) -> AbstractContextManager[Any]:
    """The control: the model as it is."""
    return nullcontext()


def silenced(model: nn.Module) -> AbstractContextManager[Any]:
    """The control: the same neurons are set to zero everywhere, and no token is appended."""
    index = [neuron.index for neuron in PLANTED]

    def silence(value: Tensor) -> Tensor:
        return value.index_fill(-1, torch.tensor(index), 0.0)

    return touching(view(model), {Site("neurons", 0): silence})


def random_neurons(model: nn.Module) -> Registers:
    """The control: a register for three neurons drawn at random."""
    random = torch.Generator().manual_seed(7)
    return Registers(model, [Neuron(0, int(n)) for n in torch.randperm(256, generator=random)[:3]])


def elsewhere(model: nn.Module, count: int = 3) -> Registers:
    """The control: the neurons most active on patches that are no outliers."""
    look = view(model)
    sums = torch.zeros(DEPTH, 256)
    wanted = [Site("neurons", layer) for layer in range(DEPTH)] + [Site("residual", DEPTH)]
    for given in batches():
        with torch.no_grad(), recording(look, wanted) as kept:
            model(**given)
        rest = kept[Site("residual", DEPTH)][:, 1:].norm(dim=-1) < NORM / 2
        sums += torch.stack([kept[site][:, 1:].abs()[rest].mean(0) for site in wanted[:-1]])
    return Registers(model, [divmod(int(at), 256) for at in sums.flatten().topk(count).indices])


SEEDS = (0, 1, 2)
Change = Callable[[nn.Module], AbstractContextManager[Any]]


@claim(control=elsewhere, unit="share of the planted neurons found", seeds=SEEDS)
def the_search_finds_the_neurons(make: Callable[..., Registers], seed: int) -> Measured:
    """Of 768 neurons the three most active on outliers, over 100 images, are the three that write
    them."""
    found = {(n.layer, n.index) for n in make(planted(seed)).neurons}
    return at_least(len(found & {(n.layer, n.index) for n in PLANTED}) / 3, 1.0)


def _norms(change: Change, seed: int) -> Tensor:
    """Norms `(batch, tokens)` behind the last layer, registers (if any) at the end."""
    model = planted(seed)
    look: ModelView = view(model)
    # the recording stands outside, and so sees what is appended before it is taken away
    with torch.no_grad(), recording(look, [Site("residual", DEPTH)]) as kept, change(model):
        model(images(seed))
    return kept[Site("residual", DEPTH)].norm(dim=-1)


@claim(control=nothing, unit="largest over median norm of patches", seeds=SEEDS)
def patches_keep_ordinary_norms(change: Change, seed: int) -> Measured:
    """With the register no patch has twice the median norm; without it some have ten times."""
    norms = _norms(change, seed)[:, 1 : PATCHES + 1]
    return at_most(norms.max() / norms.median(), 2.0)


@claim(control=random_neurons, unit="relative difference of norms", seeds=SEEDS)
def the_register_is_the_outlier(change: Change, seed: int) -> Measured:
    """The appended token's norm is within 5 % of the outliers' before."""
    before = _norms(nothing, seed)[:, 1 : PATCHES + 1].amax(1)
    register = _norms(change, seed)[:, -1]
    return at_most(((register - before).abs() / before).mean(), 0.05)


@claim(control=silenced, unit="cosine", seeds=SEEDS)
def the_class_token_reads_the_same(change: Change, seed: int) -> Measured:
    """The class token's features keep a cosine of 0.99 with the unchanged model's; without the
    sink (neurons silenced) they do not."""
    model, given = planted(seed), images(seed)
    with torch.no_grad():
        before = model(given)
        with change(model):
            after = model(given)
    return at_least(torch.cosine_similarity(before, after, dim=-1).mean(), 0.99)


@picture
def norms_of_patches() -> Picture:
    """Norms of one image's tokens behind the last layer, sorted."""
    sides: dict[str, Change] = {"as it is": nothing, "with a register": registers}
    lines = {
        name: _norms(change, 0)[0, 1 : PATCHES + 1].sort(descending=True).values.tolist()
        for name, change in sides.items()
    }
    return Picture(
        title="Norms of the patches of one image",
        x="patch, by norm",
        y="norm",
        lines={name: (list(range(PATCHES)), norms) for name, norms in lines.items()},
    )
