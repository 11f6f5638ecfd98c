"""What the class token looks at stays; the rest becomes one token.

An image classifier reads its answer off the class token, so a patch matters as far as the class
token attends to it, and this row of the map is there anyway. EViT ranks patches by it (mean over
heads) in three layers, between attention and MLP, keeps the share r of those that are there, and
adds the others up, each times its attention, into one more token. No parameters are added; every
later layer is cheaper in its projections, its map and its MLP. The class token's place is found
while the model runs, so that each image keeps patches of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headwise.compress import reduce_tokens
from headwise.compress.tokens.ranking import ClassAttention, Random, ReceivedMass
from headwise.compress.tokens.record import Record
from headwise.compress.tokens.reduction import Reduction
from headwise.models.backbones import VisionPatches
from headwise.papers import Measured, Picture, at_most, claim, paper, picture, within
from headwise.papers.digit_readers import (
    held_out_digits,
    share_right,
    trained_reader,
    untrained_reader,
)

Way = Callable[..., AbstractContextManager[Record]]


@paper(
    title="Not All Patches are What You Need: Expediting Vision Transformers via Token "
    "Reorganizations",
    source="arXiv 2202.07800",
    year=2022,
    modality="image",
    plain="In three layers the patches that the class token attends to stay, and the others are "
    "fused into one token.",
    equation=r"\mathcal{A} = \mathrm{top}_{\lceil r n \rceil}(a), \quad "
    r"a = \frac{1}{H} \sum_h \mathrm{softmax}(q^h_{\mathrm{cls}} K^{h\top} / \sqrt{d}), \quad "
    r"x_{\mathrm{fused}} = \sum_{i \notin \mathcal{A}} a_i x_i",
    parts=("Attention",),
    reported="DeiT-S: 50 % quicker for 0.3 points of ImageNet accuracy at r = 0.7; one point more "
    "at equal cost with larger images.",
    taxonomy=("beyond/tokens",),
    use="""
from headwise.papers.digit_readers import held_out_digits, trained_reader
from headwise.papers.tokens.evit import evit

with evit(trained_reader(0), keep=0.5) as record:
    logits = trained_reader(0)(held_out_digits()[0])
record.kept(2)  # (images, patches): the token in which each patch is after layer 2
""",
)
def evit(
    model: Any, keep: float = 0.7, layers: tuple[int, ...] | None = None, fuse: bool = True
) -> AbstractContextManager[Record]:
    """A vision encoder that keeps the share `keep` of its patches in each of `layers`, by default
    a quarter, half and three quarters of the way up (layers 3, 6 and 9 of 12)."""
    return _in_layers(model, keep, layers, ClassAttention("scores" if fuse else ""))


def by_chance(
    model: Any, keep: float = 0.7, layers: tuple[int, ...] | None = None, fuse: bool = True
) -> AbstractContextManager[Record]:
    """The control: as many patches, drawn at random; the mean of the others is one token."""
    return _in_layers(model, keep, layers, Random(fuse="mean" if fuse else ""))


def by_everybody(
    model: Any, keep: float = 0.7, layers: tuple[int, ...] | None = None, fuse: bool = True
) -> AbstractContextManager[Record]:
    """The control: what all tokens attend to, instead of the class token."""
    return _in_layers(model, keep, layers, ReceivedMass("scores" if fuse else ""))


def at_the_end(
    model: Any, keep: float = 0.7, layers: tuple[int, ...] | None = None, fuse: bool = True
) -> AbstractContextManager[Record]:
    """The control: all of it in the last quarter, where hardly any work is left to save."""
    return _in_layers(model, keep**3, (9,), ClassAttention("scores"))


def _in_layers(
    model: Any, keep: float, layers: tuple[int, ...] | None, way: Reduction
) -> AbstractContextManager[Record]:
    if layers is None:
        return reduce_tokens(model, keep=keep, how=way)
    return reduce_tokens(model, schedule=dict.fromkeys(layers, keep), how=way)


# -- experiments ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2)


@claim(control=by_everybody, unit="largest relative difference")
def tokens_are_reorganised_as_written(way: Way, seed: int) -> Measured:
    """Output of a random encoder against one written out in numpy, image by image, with patches
    sorted and the rest added up by hand."""
    model = untrained_reader(seed, 12, 2, 32, 2, 4).double().eval()
    images = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        with way(model, 0.5, (0,)):
            found = model(images).numpy()
        want = np.concatenate([_by_hand(model, image[None], 18) for image in images])
    return at_most(np.abs(found - want).max() / np.abs(want).max(), 1e-6)


def _by_hand(model: VisionPatches, image: Tensor, k: int) -> np.ndarray:
    """Layer 0 with reorganised tokens by hand; what follows by the model's own modules."""
    stack: Any = model.stack
    x = model.embed(image)[0]
    mixer, norms = stack.mixers[0], stack.wiring.norms
    normed = norms["mix"][0](x)
    q, key = (getattr(mixer.project, n)(normed)[0].unflatten(-1, (4, 8)) for n in ("query", "key"))
    rows = []
    for head in range(4):
        e = np.exp((key[:, head] @ q[0, head]).numpy() / np.sqrt(8))
        rows.append((e / e.sum())[1:])
    a = np.mean(rows, 0)
    x = x + mixer(normed)
    kept = sorted(np.argsort(-a)[:k].tolist())
    rest = [i for i in range(len(a)) if i not in kept]
    fused = sum(float(a[i]) * x[0, 1 + i] for i in rest)
    x = torch.stack([x[0, 0], *(x[0, 1 + i] for i in kept), fused])[None]
    x = x + stack.feeds[0](norms["feed"][0](x))
    x = x + stack.mixers[1](norms["mix"][1](x))
    x = x + stack.feeds[1](norms["feed"][1](x))
    answer: np.ndarray = model.head(stack.wiring.last(x)).numpy()  # type: ignore[misc]
    return answer


@claim(control=at_the_end, unit="share of the multiplications")
def a_third_of_the_work_goes(way: Way, seed: int) -> Measured:
    """Counted on a DeiT-S (12 layers of 384, 196 patches) at r = 0.7: 3.0 of 4.6 billion in the
    paper, 0.65; as much thrown away late saves next to nothing."""
    model = untrained_reader(seed, 224, 16, 384, 12, 6).eval()
    image = torch.zeros(1, 1, 224, 224)

    def counted() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
        return counter.get_total_flops()

    whole = counted()
    with way(model):
        return within(counted() / whole, 0.65, 0.03)


@claim(control=by_chance, unit="accuracy lost", seeds=SEEDS, quick=False)
def a_third_of_the_patches_is_enough(way: Way, seed: int) -> Measured:
    """A model trained with all patches loses at most 2.5 points where, from the first attention
    on, 5 of 16 and the fused rest stay; with random ones it loses more."""
    model = trained_reader(seed)
    whole = share_right(model)
    with way(model, 0.3, (0,)):
        return at_most(whole - share_right(model), 0.025, whole=whole)


@picture
def surviving_patches() -> Picture:
    """A digit, and for what share of three stages each patch stays a token of its own."""
    model, images = trained_reader(0), held_out_digits()[0][:100]
    maps = {"a digit: ink": images[0, 0].tolist()}
    for name, way in (("EViT", evit), ("control", by_chance)):
        with torch.no_grad(), way(model, 0.6, (0, 1, 2)) as record:
            model(images)
        stages = [record.kept(layer) for layer in (0, 1, 2)]
        alone = [(groups[:, :, None] == groups[:, None]).sum(-1) == 1 for groups in stages]
        share = torch.stack(alone).float().mean(0).view(-1, 4, 4)
        if way is evit:
            maps["EViT, this digit"] = share[0].tolist()
        maps[f"{name}, 100 digits"] = share.mean(0).tolist()
    return Picture(
        title="Share of three stages for which a patch stays a token of its own",
        x="column (of pixels, of patches)",
        y="row",
        maps=maps,
    )
