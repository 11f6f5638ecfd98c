"""Guidance by a weaker model that differs in a few chosen heads.

Diffusion models can be guided away from a copy of themselves whose attention is spoilt: its map is
replaced by the identity, so that each token sees only itself. Spoiling whole layers is coarse. The
paper spoils single heads, finds that they carry separate things (structure, light, texture, a
style), and chooses them greedily by what the guided images score. The map may also be spoilt by
degrees, A' = (1 - u) A + u I, which needs no map: A' V = (1 - u) A V + u V.

The denoiser here is planted: of 16 heads two pull patches towards a style token, the others smooth
their own features over all patches, so that guiding by them costs detail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from torch import Tensor, nn

from headwise.edits import Scale, TowardsSelf, swap
from headwise.edits.change import Change
from headwise.models import Site, observe, recording, view
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention, MultiHead
from headwise.train import seeded

Heads = tuple[int, ...]
Score = Callable[[Heads], float]


@paper(
    title="Fine-Grained Perturbation Guidance via Attention Head Selection",
    source="arXiv 2506.10978",
    year=2025,
    modality="image",
    plain="Guide a diffusion model away from itself with the maps of a few greedily chosen heads "
    "pulled towards the identity.",
    equation=r"A' = (1-u)A + uI, \quad \hat\epsilon = \epsilon + w(\epsilon - \epsilon_{A'})",
    parts=("Attention",),
    reported="Better quality and chosen styles on Stable Diffusion 3 and FLUX.1, where guidance "
    "by whole layers smooths images over.",
    unsure="How many heads a round adds; here one.",
    taxonomy=("beyond/analysis",),
    use="""
from headwise.papers.steer.headhunter_softpag import generate, hunt, objective, planted

heads = hunt(range(16), objective(planted(), seed=0))
images = generate(planted(), heads, seed=1)
""",
)
def hunt(candidates: Iterable[int], score: Score, rounds: int = 16) -> Heads:
    """HeadHunter: each round adds the head whose guidance, beside those chosen before, scores best,
    until none gains."""
    chosen: Heads = ()
    best, left = score(()), list(candidates)
    for _ in range(min(rounds, len(left))):
        scores = {head: score((*chosen, head)) for head in left}
        head = max(scores, key=scores.__getitem__)
        if scores[head] <= best:
            break
        chosen, best = (*chosen, head), scores[head]
        left.remove(head)
    return chosen


@torch.no_grad()
def guided(
    model: nn.Module, x: Tensor, heads: Heads, u: float = 1.0, weight: float = 1.5
) -> Tensor:
    """The model's answer, pushed away from that with these heads' maps pulled to the identity."""
    plain: Tensor = model(x)
    if not heads:
        return plain
    with swap(model, {(0, heads): TowardsSelf(u)}):
        spoilt = model(x)
    return plain + weight * (plain - spoilt)


# -- a denoiser in which the truth is known -------------------------------------------------------

HEADS, WIDTH, PATCHES, STEPS, RATE = 16, 4, 24, 5, 0.12
STYLED = {3, 11}
"""The heads that look at the style token; each writes its own four features."""
STYLE, ASKS = HEADS * WIDTH, HEADS * WIDTH + 1
"""Features that mark the style token, and every patch."""


class Denoiser(nn.Module):
    """Patches `(batch, n, 64)` to what they should become, of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Parameter(torch.zeros(HEADS * WIDTH + 2))
        project = MultiHead(head_dim=WIDTH)
        self.layers = nn.ModuleList([Attention(HEADS * WIDTH + 2, HEADS, project)])

    def forward(self, x: Tensor) -> Tensor:
        flags = x.new_zeros((*x.shape[:2], 2))
        flags[..., 1] = 1.0
        tokens = torch.cat([self.style.expand(len(x), 1, -1), torch.cat([x, flags], -1)], 1)
        out: Tensor = self.layers[0](tokens)
        return out[:, 1:, : HEADS * WIDTH]


@cache
@torch.no_grad()
def planted() -> Denoiser:
    with seeded(0):
        model = Denoiser().eval()
    (attention,) = view(model).attentions
    q, k, v, o = (
        attention.query_weight(),
        attention.key_weight(),
        attention.value_weight(),
        attention.output_weight(),
    )
    for weight in (q, k, v, o):
        weight.zero_()
    size = attention.head_dim
    for head in range(HEADS):
        own = slice(head * WIDTH, (head + 1) * WIDTH)
        v[head, :WIDTH, own] = torch.eye(WIDTH)
        o[head, own, :WIDTH] = torch.eye(WIDTH)
        q[head, 0, ASKS] = 1.0
        # others turn away from the style token, and are even over patches
        k[head, 0, STYLE] = (9.0 if head in STYLED else -9.0) * size**0.5
        if head in STYLED:
            model.style[own] = torch.tensor([2.0, -2.0, 2.0, -2.0])
    model.style[STYLE] = 1.0
    return model


def generate(model: nn.Module, heads: Heads, seed: int, u: float = 1.0) -> Tensor:
    """Some images from noise, `(8, PATCHES, 64)`: a few steps towards what the model answers."""
    x = torch.randn(8, PATCHES, HEADS * WIDTH, generator=torch.Generator().manual_seed(seed))
    for _ in range(STEPS):
        x = x + RATE * (guided(model, x, heads, u) - x)
    return x


def objective(model: Denoiser, seed: int, u: float = 1.0) -> Score:
    """Heads -> how close generated images are to the style, minus the detail that they lost: mean
    square distance of the styled features, and variance over patches of the others."""

    def score(heads: Heads) -> float:
        x = generate(model, heads, seed, u).unflatten(-1, (HEADS, WIDTH))
        style = model.style[:STYLE].detach().view(HEADS, WIDTH)
        styled = torch.tensor([head in STYLED for head in range(HEADS)])
        distance = (x - style)[:, :, styled].square().mean()
        return float(x[:, :, ~styled].var(1).mean() - distance)

    return score


SEEDS = (0, 1, 2)


@claim(
    subject=TowardsSelf,
    control=lambda u: Scale(1 - u),
    unit="largest difference",
    seeds=SEEDS,
)
def no_map_is_needed(make: Callable[[float], Change], seed: int) -> Measured:
    """On random weights a head gives what the explicit map (1 - u) A + u I gives, to 1e-5, at u of
    0.3; the other heads give what they gave, to rounding."""
    with seeded(seed):
        model = Denoiser().eval()
    x = torch.randn(2, PATCHES, STYLE, generator=torch.Generator().manual_seed(seed))
    look, site, kept = view(model), Site("heads", 0), []
    values = Site("values", 0)
    with (
        torch.no_grad(),
        recording(look, [site, values]) as there,
        observe(look, lambda r: kept.append(r.map.dense())),
    ):
        model(x)
    identity = torch.eye(PATCHES + 1)
    want = there[site].clone()
    for head in STYLED:
        spoilt = 0.7 * kept[0][:, head] + 0.3 * identity
        want[:, :, head] = spoilt @ there[values][:, :, head]
    with (
        torch.no_grad(),
        recording(look, [site]) as there,
        swap(model, {(0, tuple(STYLED)): make(0.3)}),
    ):
        model(x)
    return at_most((there[site] - want).abs().max(), 1e-5)


def by_index(candidates: Iterable[int], score: Score) -> Heads:
    """The control: the first two heads."""
    return tuple(candidates)[:2]


def whole_layer(candidates: Iterable[int], score: Score) -> Heads:
    """The control: all heads, as in guidance by layers."""
    return tuple(candidates)


@claim(control=by_index, unit="Jaccard index", seeds=SEEDS)
def the_styled_heads_are_found(choose: Callable[..., Heads], seed: int) -> Measured:
    """The hunt ends with exactly the two heads that carry the style."""
    found = set(choose(range(HEADS), objective(planted(), seed)))
    return at_least(len(found & STYLED) / len(found | STYLED), 1.0)


@claim(control=whole_layer, unit="gain of the objective", seeds=SEEDS)
def few_heads_guide_better_than_the_layer(choose: Callable[..., Heads], seed: int) -> Measured:
    """On other noise than they were chosen on, the chosen heads guide to a score at least 0.1 above
    the whole layer's, which loses detail."""
    heads = choose(range(HEADS), objective(planted(), seed))
    score = objective(planted(), 100 + seed)
    layer = score(tuple(range(HEADS)))
    return at_least(score(heads) - layer, 0.1, heads=float(len(heads)), nothing=score(()) - layer)


@claim(subject=0.5, control=0.0, unit="share of the full gain", seeds=SEEDS)
def half_a_perturbation_is_between(u: float, seed: int) -> Measured:
    """Maps pulled half of the way give between a quarter and all of what the identity gains; not
    pulled at all they give nothing."""
    gains = [
        (score := objective(planted(), seed, strength))(tuple(STYLED)) - score(())
        for strength in (u, 1.0)
    ]
    share = gains[0] / gains[1]
    return at_least(share if share < 1 else 0.0, 0.25)


@picture
def gain_by_strength() -> Picture:
    """The objective over u, for the styled heads and the whole layer."""
    strengths = [0.0, 0.25, 0.5, 0.75, 1.0]
    groups = {"the two heads": tuple(STYLED), "whole layer": tuple(range(HEADS))}
    gain = partial(objective, planted(), 0)
    return Picture(
        title="Objective of guided images",
        x="u",
        y="gain over no guidance",
        lines={
            name: (strengths, [gain(u)(heads) - gain(u)(()) for u in strengths])
            for name, heads in groups.items()
        },
    )
