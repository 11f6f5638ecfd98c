"""A feed-forward layer without a nonlinearity, which is a third-order tensor.

Two projections multiplied element by element, and no activation: the layer does as well as one with
a nonlinearity, and is a quadratic form in its input for every output direction. So what it does can
be said exactly by linear algebra. For an output direction u, u^T MLP(x) = x^T B_u x with a
symmetric matrix B_u, whose eigenvectors are the features that it squares and adds up. And where
attention patterns are held fixed, attention followed by such a layer is a sum over pairs of paths
(direct, or through a head), each a bilinear form of two tokens: the framework of transformer
circuits, which had to leave feed-forward layers out, takes them in.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.instruments.qk_ov import ov
from headwise.models import Site, observe, recording, view
from headwise.models.backbones import Decoder
from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.parts import Attention
from headwise.parts.feed.gated import Gated
from headwise.parts.feed.mlp import Mlp
from headwise.train import seeded


@paper(
    title="A technical note on bilinear layers for interpretability",
    source="arXiv 2305.03452",
    year=2023,
    modality="text",
    plain="A gated feed-forward layer without its nonlinearity is a quadratic form in every output "
    "direction, so that its features are eigenvectors.",
    equation=r"u^\top \mathrm{MLP}(x) = x^\top B_u\, x, \quad B_u = \tfrac{1}{2}"
    r"(W_1^\top \mathrm{diag}(W_o^\top u)\, W_2 + W_2^\top \mathrm{diag}(W_o^\top u)\, W_1)",
    parts=("Gated",),
    taxonomy=("beyond/analysis",),
    use="""
import torch
from headwise.papers.lens.bilinear_mlp import bilinear, quadratic_form

layer = bilinear(16)
values, vectors = torch.linalg.eigh(quadratic_form(layer, torch.ones(16)))
""",
)
def bilinear(dim: int, hidden: int | None = None, bias: bool = False) -> Gated:
    """W_o (W_1 x * W_2 x): `Gated` with the identity for an activation."""
    return Gated(dim, hidden, activation=_identity, bias=bias)


def _identity(x: Tensor) -> Tensor:
    return x


def with_relu(dim: int, hidden: int | None = None, bias: bool = False) -> Gated:
    """The control: ReGLU, the same layer with a nonlinearity in its gate."""
    return Gated(dim, hidden, activation=F.relu, bias=bias)


def quadratic_form(layer: Gated, direction: Tensor) -> Tensor:
    """B_u, symmetric `(dim, dim)`, or `(dim + 1, dim + 1)` for a layer with biases: they are read
    by a last input that is always one."""
    gate, up = (_with_bias(part) for part in (layer.gate, layer.up))
    weight = direction.to(gate) @ layer.down.weight
    form = gate.mT @ (weight[:, None] * up)
    if layer.down.bias is not None:
        form = form.clone()
        form[-1, -1] += direction.to(gate) @ layer.down.bias
    return (form + form.mT) / 2


def tensor(layer: Gated) -> Tensor:
    """All of it, B `(dim, in, in)`: for small layers."""
    rows = torch.eye(layer.dim, dtype=layer.down.weight.dtype)
    return torch.stack([quadratic_form(layer, row) for row in rows])


def _with_bias(part: nn.Linear) -> Tensor:
    if part.bias is None:
        return part.weight
    return torch.cat([part.weight, part.bias[:, None]], 1)


@claim(control=with_relu, unit="largest relative difference", seeds=(0, 1))
def the_layer_is_its_tensor(make: Any, seed: int) -> Measured:
    """Contracting the symmetric tensor twice with [x, 1] gives what the layer gives."""
    layer = make(12, 20, bias=True).double()
    x = torch.randn(50, 12, dtype=torch.float64)
    ones = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    found = torch.einsum("ajk,nj,nk->na", tensor(layer), ones, ones)
    expected = layer(x)
    return at_most((found - expected).abs().max() / expected.abs().max(), 1e-10)


# -- attention and the layer behind it, as a sum over pairs of paths


def pair_terms(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the feed-forward layer of a one-layer model without norms adds, from the sum over all
    pairs of paths, and as the model computes it: `(n, width)` each, for ids `(1, n)`.

    A path is the token itself, or a head that brings other tokens with the pattern that it has.
    """
    look, layer = view(model), model.stack.feeds[0]
    assert isinstance(layer, Gated)
    site, maps = Site("mlp", 0), []
    with (
        torch.no_grad(),
        recording(look, [site]) as kept,
        observe(look, lambda reading: maps.append(reading.map.dense()[0])),
    ):
        model(ids)
    x = model.embed(ids)[0].detach().double()
    circuits = [ov(look, 0, head) for head in range(look.attentions[0].heads)]
    paths = [x, *(maps[0][h].double() @ one.apply(x) for h, one in enumerate(circuits))]
    form = tensor(layer).detach().double()
    terms = [torch.einsum("ajk,nj,nk->na", form, a, b) for a, b in product(paths, paths)]
    return torch.stack(terms).sum(0), kept[site][0].double()


def one_layer(feed: Any, seed: int) -> Decoder:
    """Attention and a feed-forward layer, no norms, as the note has it."""
    with seeded(seed):
        model = Decoder(
            20,
            24,
            1,
            mixer=lambda layer: Attention(24, 3, causal=True),
            feed=lambda layer: feed(24),
            norm=nn.Identity,
        )
        nn.init.normal_(model.embed.weight)
    return model


@claim(control=with_relu, unit="largest relative difference", seeds=(0, 1))
def attention_and_layer_are_a_sum_of_pairs_of_paths(make: Any, seed: int) -> Measured:
    """With the patterns held fixed, 4 paths (direct, three heads) make 16 terms, whose sum is what
    the layer behind the attention adds."""
    model = one_layer(make, seed)
    found, expected = pair_terms(model, torch.randint(20, (1, 12)))
    return at_most((found - expected).abs().max() / expected.abs().max(), 1e-5)


# -- trained: the eigenvectors are the features


def target(seed: int) -> Tensor:
    """Two orthonormal directions `(2, 16)` whose product is to be learned."""
    draw = torch.Generator().manual_seed(100 + seed)
    return torch.linalg.qr(torch.randn(16, 2, generator=draw))[0].mT


@cache
def trained(seed: int) -> Gated:
    """A layer that learned y = (a x)(b x) in its first output."""
    a, b = target(seed)
    with seeded(seed):
        layer = bilinear(16, 24)
        adam = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(600):
            x = torch.randn(256, 16)
            loss = (layer(x)[:, 0] - (x @ a) * (x @ b)).pow(2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return layer


def eigenvectors(layer: Gated, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Features of an output: unit vectors `(dim, dim)`, in columns, and their weights `(dim,)`."""
    weights, vectors = torch.linalg.eigh(quadratic_form(layer, direction).detach())
    return vectors, weights


def neurons(layer: Gated, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The control: each neuron is a feature, what its gate looks for, as strong as its weights."""
    gate, up = layer.gate.weight.detach(), layer.up.weight.detach()
    out = direction @ layer.down.weight.detach()
    return F.normalize(gate, dim=-1).mT, out * gate.norm(dim=-1) * up.norm(dim=-1)


@claim(subject=eigenvectors, control=neurons, unit="share of the energy", seeds=(0, 1, 2))
def two_eigenvectors_hold_what_was_learned(features: Any, seed: int) -> Measured:
    """After training on (a x)(b x), the two strongest eigenvectors hold at least 0.9 of the energy
    and span a and b (the value is the smaller of the energy and the cosine of the larger principal
    angle). The two strongest neurons of 24 do not: others cancel what they say beside."""
    vectors, weights = features(trained(seed), F.one_hot(torch.tensor(0), 16).float())
    best = weights.abs().argsort(descending=True)[:2]
    energy = weights[best].pow(2).sum() / weights.pow(2).sum()
    spanned = torch.linalg.qr(vectors[:, best])[0]
    cosine = torch.linalg.svdvals(spanned.mT @ target(seed).mT).min()
    return at_least(torch.minimum(energy, cosine), 0.9, energy=energy, cosine=cosine)


def ordinary(dim: int) -> Mlp:
    """The control: a feed-forward layer with a ReLU, as wide."""
    return Mlp(dim, 4 * dim, F.relu)


@claim(control=ordinary, unit="largest relative difference")
def twice_the_input_is_four_times_the_output(make: Any, seed: int) -> Measured:
    """Without biases the layer is homogeneous of degree two."""
    layer, x = make(16), torch.randn(30, 16)
    four = 4 * layer(x)
    return at_most((layer(2 * x) - four).abs().max() / four.abs().max(), 1e-5)


@picture
def spectra() -> Picture:
    """Eigenvalues of what was learned, beside those of a layer that was not trained."""
    direction = F.one_hot(torch.tensor(0), 16).float()
    with seeded(0):
        layers = {"trained on (a x)(b x)": trained(0), "random": bilinear(16, 24)}
    return Picture(
        title="Eigenvalues of one output of a bilinear layer",
        x="eigenvalue, in order",
        y="value",
        lines={
            name: (
                list(range(16)),
                torch.linalg.eigvalsh(quadratic_form(layer, direction).detach()).tolist(),
            )
            for name, layer in layers.items()
        },
    )
