"""How long the vectors are that an attention moves, in place of its weights.

What position i receives from position j is a vector, and by how much it moves i is its length:

    u_ij = sum over heads of A^h_ij f_h(x_j),  f_h(x) = (x W_V^h + b_V^h) W_O^h
                                             "attention" (Kobayashi et al. 2020, arXiv 2004.10102)
    u_ij + x_i where i = j                   "residual"  (Kobayashi et al. 2021, arXiv 2109.07152)
    g_1(u_ij + ...)                          "norm"      with the norm behind attention (the same)
    g_2(g_1(u_ij + ...))                     "layer"     with the norm behind the feed-forward part,
                                             whose own work is left out (GlobEnc, arXiv 2205.03286)

A norm with the statistics of the true sum is linear: g(u) = gain * (u - mean u) / size_i. So both
norms are one matrix M and one number a row, and the squared length is a quadratic form of the
heads' weights, A_ij^T G_j A_ij with G_j = F_j^T M^T M F_j of heads x heads numbers. Vectors of
n x n pairs are never made; rows come in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.instruments.gains import Gain
from headwise.maps import AttentionMap
from headwise.models import AttentionView

__all__ = ["INCLUDE", "NormMap", "gram_of", "linear", "moved"]

INCLUDE = ("attention", "residual", "norm", "layer")
TILE = 2**22
"""Numbers of a map that are held at a time."""
KEYS = 64


@dataclass(frozen=True, eq=False)
class NormMap:
    """Lengths of what moves in one layer. `map` and `value` as the model's own; `stream`
    `(batch, n, width)`: what the residual holds at first; `norms`: those behind, each with its
    factor `(batch, n)`, one over the size of what it normalised; `gram` `(batch, n, heads + 1,
    heads + 1)` float64, the last of each for the residual; `rest` `(batch, n, width)`: biases, and
    what the feed-forward part adds, which come from no position.
    """

    attention: AttentionView
    map: AttentionMap
    value: Tensor
    stream: Tensor
    include: str
    norms: tuple[tuple[Gain, Tensor], ...]
    gram: Tensor
    rest: Tensor

    def rows(self, places: Tensor) -> Tensor:
        """Lengths `(batch, rows, n)` float64 of what the positions `places` receive from each."""
        a = self.map.rows(places).double()  # (batch, heads, rows, n)
        heads = a.shape[1]
        a = a.permute(0, 3, 2, 1)  # (batch, n, rows, heads)
        squared = ((a @ self.gram[..., :heads, :heads]) * a).sum(-1)
        if self.include != "attention":
            at = torch.arange(len(places), device=places.device)
            own = a[:, places, at]  # (batch, rows, heads)
            gram = self.gram[:, places]
            mixed = 2 * (own * gram[..., :heads, heads]).sum(-1) + gram[..., heads, heads]
            squared[:, places, at] += mixed
        return squared.clamp_min(0).sqrt().transpose(1, 2) * self._factor(places)[..., None]

    def shares(self, places: Tensor) -> Tensor:
        """`rows`, each divided by its sum; zeros where nothing is received."""
        found = self.rows(places)
        return found / found.sum(-1, keepdim=True).clamp_min(1e-300)

    def carry(self, weights: Tensor) -> Tensor:
        """`(batch, n)` weights of rows times `shares`: one step of a rollout, by tiles."""
        batch, n = weights.shape
        heads = self.gram.shape[-1] - 1
        size = max(1, TILE // (batch * heads * n))
        made = torch.zeros(batch, n, dtype=torch.float64, device=weights.device)
        for start in range(0, n, size):
            places = torch.arange(start, min(start + size, n), device=weights.device)
            places = places[(weights[:, places] != 0).any(0)]
            if len(places):
                made += torch.einsum("br,brn->bn", weights[:, places].double(), self.shares(places))
        return made

    def vectors(self, place: int) -> Tensor:
        """The vectors themselves `(batch, n, width)` float64 that one position receives. Their sum
        and `rest` are what is there behind the last part that is included."""
        at = torch.tensor([place], device=self.value.device)
        a = self.map.rows(at).double()[:, :, 0]  # (batch, heads, n)
        u = torch.einsum("bhn,bnhw->bnw", a, moved(self.attention, self.value))
        if self.include != "attention":
            u[:, place] += self.stream[:, place].double()
        for gain, factor in self.norms:
            u = linear(gain, u) * factor[:, place, None, None]
        return u

    def _factor(self, places: Tensor) -> Tensor:
        found = torch.ones(len(self.stream), len(places), dtype=torch.float64)
        found = found.to(self.stream.device)
        for _, factor in self.norms:
            found = found * factor[:, places]
        return found


def moved(attention: AttentionView, value: Tensor) -> Tensor:
    """f_h(x_j) `(batch, n, heads, width)` float64, from values `(batch, kv_heads, n, d_v)`."""
    group = attention.heads // value.shape[1]
    v = value.double().repeat_interleave(group, 1)
    return torch.einsum("bhnd,hwd->bnhw", v, attention.output_weight().detach().double())


def linear(gain: Gain, x: Tensor) -> Tensor:
    """The linear part of a norm on vectors `(..., width)`, but for its division."""
    centred = x - x.mean(-1, keepdim=True) if gain.centred else x
    return centred * gain.gain.to(x)


def gram_of(attention: AttentionView, value: Tensor, stream: Tensor, gains: list[Gain]) -> Tensor:
    """`(batch, n, heads + 1, heads + 1)` float64: inner products of what a position would send
    through each head, and of what it keeps, behind the norms."""
    found = []
    for start in range(0, stream.shape[1], KEYS):
        some = slice(start, start + KEYS)
        both = torch.cat([moved(attention, value[:, :, some]), stream[:, some, None].double()], 2)
        for gain in gains:
            both = linear(gain, both)
        found.append(both @ both.mT)
    return torch.cat(found, 1)
