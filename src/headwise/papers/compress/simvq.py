"""A codebook that moves as a whole: fixed random codes times one learned matrix.

In a vector quantiser only the codes that were chosen get a gradient. Codes that start far from the
data are never chosen, so they never move, and most of a large codebook lies idle. The paper writes
the codes as fixed Gaussian vectors times one matrix that is learned. Whatever code is chosen, its
gradient reaches the matrix, and with it every code: the codebook turns and stretches until it
covers the data. After training the product is an ordinary codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headwise.papers import Measured, Picture, at_least, at_most, claim, paper, picture
from headwise.train import seeded

DIM, CODES, CLUSTERS, STEPS = 16, 1024, 256, 500
SEEDS = (0, 1, 2)


class Chosen(NamedTuple):
    """`quantised`: as the input, passing gradients straight through; `indices`: `(...)`; `loss`:
    of codes and of commitment."""

    quantised: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantiser(nn.Module):
    """The control: codes are parameters of their own."""

    basis: Tensor

    def __init__(self, dim: int, codes: int, commitment: float = 0.25) -> None:
        super().__init__()
        self.commitment = commitment
        self.basis = nn.Parameter(torch.randn(codes, dim) * dim**-0.5)

    def codes(self) -> Tensor:
        """`(codes, dim)`."""
        return self.basis

    def forward(self, z: Tensor) -> Chosen:
        """The nearest code of each vector `(..., dim)`."""
        codes = self.codes()
        flat = z.reshape(-1, z.shape[-1])
        indices = torch.cdist(flat.detach(), codes.detach()).argmin(-1)
        chosen = codes[indices].view_as(z)
        loss = (z.detach() - chosen).square().mean()
        loss = loss + self.commitment * (z - chosen.detach()).square().mean()
        return Chosen(z + (chosen - z).detach(), indices.view(z.shape[:-1]), loss)


@paper(
    title="Addressing Representation Collapse in Vector Quantized Models with One Linear Layer",
    source="arXiv 2411.02038",
    year=2024,
    plain="Codes are fixed random vectors times one learned matrix, so that every step moves all "
    "of them and none dies.",
    equation=r"q_j = c_j W, \quad \mathcal{L} = \| x - \hat{x} \|^2 "
    r"+ \| \mathrm{sg}[z] - q \|^2 + \beta \| z - \mathrm{sg}[q] \|^2",
    parts=(),
    reported="Nearly the whole codebook in use on images and audio, whatever its size.",
    taxonomy=("beyond/compression",),
    use="""
import torch
from headwise.papers.compress.simvq import SimVQ

quantiser = SimVQ(dim=16, codes=1024)
quantised, indices, loss = quantiser(torch.randn(2, 50, 16))
""",
)
class SimVQ(VectorQuantiser):
    """Codes `basis @ W^T`: the basis (Gaussian, of norm about 1) stays as it was drawn."""

    def __init__(self, dim: int, codes: int, commitment: float = 0.25) -> None:
        super().__init__(dim, codes, commitment)
        drawn = self.basis.detach()
        del self.basis
        self.register_buffer("basis", drawn)
        self.turn = nn.Linear(dim, dim, bias=False)

    def codes(self) -> Tensor:
        codes: Tensor = self.turn(self.basis)
        return codes


class Untied(SimVQ):
    """The basis learned, and W the identity: what the paper says plain quantisation is."""

    def __init__(self, dim: int, codes: int, commitment: float = 0.25) -> None:
        super().__init__(dim, codes, commitment)
        drawn = self.basis
        del self.basis
        self.basis = nn.Parameter(drawn)
        nn.init.eye_(self.turn.weight)
        self.turn.requires_grad_(False)


Quantiser = Callable[[int, int], VectorQuantiser]


class Trained(NamedTuple):
    used: float
    error: float
    codes: Tensor


def data(seed: int, count: int) -> Tensor:
    """Points in clusters on a flat sheet of 3 of the 16 dimensions; most codes lie far from it."""
    drawn = torch.Generator().manual_seed(99)
    sheet = torch.linalg.qr(torch.randn(DIM, DIM, generator=drawn))[0][:3]
    centres = torch.randn(CLUSTERS, 3, generator=drawn)
    made = torch.Generator().manual_seed(seed)
    at = torch.randint(CLUSTERS, (count,), generator=made)
    return (centres[at] + 0.3 * torch.randn(count, 3, generator=made)) @ sheet


@cache
def trained(kind: Quantiser, seed: int, steps: int = STEPS) -> Trained:
    """A small autoencoder, a linear map either way, with this quantiser in between."""
    with seeded(seed), torch.enable_grad():
        encode, decode = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        quantiser = kind(DIM, CODES)
        for layer in (encode, decode):
            nn.init.eye_(layer.weight)
        learned = [p for m in (quantiser, encode, decode) for p in m.parameters()]
        optimiser = torch.optim.Adam([p for p in learned if p.requires_grad], 1e-2)
        for step in range(steps):
            x = data(1000 * (seed + 1) + step, 256)
            got = quantiser(encode(x))
            loss = (decode(got.quantised) - x).square().mean() + got.loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        x = data(7, 16384)
        got = quantiser(encode(x))
        error = float((decode(got.quantised) - x).square().mean())
        used = len(got.indices.unique()) / CODES
        return Trained(used, error, quantiser.codes().detach().clone())


def moved(kind: Quantiser, seed: int) -> tuple[int, int]:
    """How many codes one step of descent moves, and how many were chosen in it."""
    with seeded(seed), torch.enable_grad():
        quantiser = kind(DIM, CODES)
        x = torch.randn(16, DIM)
        before = quantiser.codes().detach().clone()
        optimiser = torch.optim.SGD([p for p in quantiser.parameters() if p.requires_grad], 0.5)
        got = quantiser(x)
        got.loss.backward()
        optimiser.step()
        changed = (quantiser.codes().detach() != before).any(-1)
    return int(changed.sum()), len(got.indices.unique())


@claim(control=VectorQuantiser, unit="share of codes that moved", seeds=SEEDS)
def one_step_moves_every_code(kind: Quantiser, seed: int) -> Measured:
    """After one step in which 16 codes at most were chosen, all 1024 are elsewhere; codes of their
    own move only where they were chosen."""
    count, chosen = moved(kind, seed)
    return at_least(count / CODES, 1.0, chosen=chosen / CODES)


@claim(control=VectorQuantiser, unit="share of codes in use", seeds=SEEDS, quick=False)
def the_codebook_is_used(kind: Quantiser, seed: int) -> Measured:
    """In an autoencoder of data on a thin sheet, at least nine tenths of 1024 codes are chosen by
    some point; codes of their own stay where the data are not."""
    return at_least(trained(kind, seed).used, 0.9)


@claim(control=VectorQuantiser, unit="error of codes of their own", seeds=SEEDS, quick=False)
def the_data_are_told_better(kind: Quantiser, seed: int) -> Measured:
    """Error of reconstruction at most 0.7 of that with codes of their own."""
    plain = trained(VectorQuantiser, seed).error
    return at_most(trained(kind, seed).error / plain, 0.7, plain=plain)


@claim(control=SimVQ, subject=Untied, unit="largest difference of codes", seeds=SEEDS)
def without_the_matrix_it_is_plain(kind: Quantiser, seed: int) -> Measured:
    """The same network with the basis learned and the matrix held at the identity is a plain
    quantiser, to the bit, after 20 steps: the gain is not in how codes are written."""
    plain = trained(VectorQuantiser, seed, 20).codes
    return at_most((trained(kind, seed, 20).codes - plain).abs().max(), 0.0)


@picture
def codes_in_use() -> Picture:
    """How many codes are in use as training goes on."""
    steps = [0, 50, 100, 200, 350, 500]
    kinds: dict[str, Quantiser] = {
        "codes alone (control)": VectorQuantiser,
        "one matrix (SimVQ)": SimVQ,
    }
    lines = {
        name: (steps, [100 * trained(kind, 0, n).used for n in steps])
        for name, kind in kinds.items()
    }
    return Picture(
        title="A codebook of 1,024 in training: how many codes are in use",
        x="training steps",
        y="codes in use, %",
        lines=lines,
    )
