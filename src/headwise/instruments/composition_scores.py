"""How much of what one head writes another head reads, from the weights alone.

Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Q-, K- and V-composition":

    Q   |W_QK^T W_OV|_F / (|W_QK|_F |W_OV|_F)       the writer moves what the reader asks
    K   |W_QK   W_OV|_F / (...)                     what the reader's keys say
    V   |W_OV'  W_OV|_F / (...)                     what the reader hands on

Merullo et al. 2024, arXiv 2406.09519, equation 2, score one singular component of the writer's
W_OV at a time, which finds channels of one dimension that the whole matrix drowns.

The scale of these numbers: if the writer's directions were turned at random against the reader's,
the mean square of every score would be 1 / width, exactly, whatever the spectra (E[U T U^T] =
tr(T) / width I for orthogonal U). So `random` is 1 / sqrt(width), and `z` tells by how many
standard deviations the squared score exceeds that, with the variance of tr(S U T U^T) over
orthogonal U: 2 |S'|^2 |T'|^2 / ((width - 1) (width + 2)), S' and T' without their traces. Real
residual streams have a few directions that everybody writes and reads, so that most pairs stand
far above random ones: compare pairs with each other as well.

Everything comes from thin factors: W_Q^T = Q R gives |W_QK W_OV| = |R W_K W_O L|, a product of the
size of two heads, W_V^T = Q L^T alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from headwise.instruments.examples import model_view
from headwise.instruments.folded import query_and_key, value_and_output
from headwise.models import ModelView
from headwise.models.structure import AttentionView

__all__ = ["KINDS", "Composition", "Pair", "composition", "composition_by_component"]

KINDS = ("q", "k", "v")

Head = tuple[int, int]


class Pair(NamedTuple):
    """One row of a table: a writer (layer, head), a reader in a later layer, and their score."""

    kind: str
    writer: Head
    reader: Head
    score: float
    z: float


@dataclass(frozen=True, eq=False)
class Composition:
    """Scores of all pairs of heads of one stack.

    heads: (layer, head) of rows and columns. scores, z: kind -> float64 `(writers, readers)`, NaN
    where the reader stands in no later layer. random: the root mean square of a score between
    directions turned at random. left_out: what the numbers do not contain.
    """

    heads: tuple[Head, ...]
    scores: dict[str, np.ndarray]
    z: dict[str, np.ndarray]
    random: float
    left_out: tuple[str, ...] = ()

    def top(self, n: int = 10, kind: str | None = None, by: str = "score") -> list[Pair]:
        """The n pairs with the highest score (or `by="z"`), of one kind or of all.

        Raises ValueError for a kind that was not computed.
        """
        kinds = self._kinds(kind)
        if by not in ("score", "z"):
            raise ValueError(f"by={by!r}: expected 'score' or 'z'")
        found = [pair for name in kinds for pair in self._pairs(name)]
        found.sort(key=lambda pair: -(pair.score if by == "score" else pair.z))
        return found[:n]

    def of(self, writer: Head, reader: Head, kind: str) -> Pair:
        """One pair. Raises ValueError for heads that are not there or not one after the other."""
        (kind,) = self._kinds(kind)
        missing = [head for head in (writer, reader) if head not in self.heads]
        if missing:
            raise ValueError(f"no head {missing[0]}: expected (layer, head) out of {self.heads}")
        at = self.heads.index(writer), self.heads.index(reader)
        if math.isnan(self.scores[kind][at]):
            raise ValueError(f"{reader} stands in no later layer than {writer}")
        return Pair(kind, writer, reader, float(self.scores[kind][at]), float(self.z[kind][at]))

    def _kinds(self, kind: str | None) -> tuple[str, ...]:
        if kind is not None and kind not in self.scores:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(self.scores)}")
        return tuple(self.scores) if kind is None else (kind,)

    def _pairs(self, kind: str) -> list[Pair]:
        scores, z = self.scores[kind], self.z[kind]
        return [
            Pair(kind, self.heads[w], self.heads[r], float(scores[w, r]), float(z[w, r]))
            for w, r in zip(*np.nonzero(~np.isnan(scores)), strict=True)
        ]


def composition(
    model: nn.Module | ModelView,
    kinds: tuple[str, ...] = KINDS,
    stack: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Composition:
    """Composition scores of all pairs of self-attention heads, writer in an earlier layer.

    The norm's gain in front of the reader is folded in; rotary embeddings are those at offset 0
    (they turn a head's features, which changes W_QK but not what it can read). Takes about
    2 (heads head_dim)^2 width operations for each kind.

    Raises ValueError for unknown kinds or a stack that must be said, UnsupportedModelError where
    weights or gains are not known.
    """
    view, stack = model_view(model), _one_stack(model_view(model), stack)
    bad = [kind for kind in kinds if kind not in KINDS]
    if bad:
        raise ValueError(f"kinds={kinds}: expected some of {', '.join(KINDS)}")
    found = [a for a in view.attentions if a.stack == stack and a.kind == "self"]
    heads = tuple((a.layer, h) for a in found for h in range(a.heads))
    shape = (len(heads), len(heads))
    scores = {kind: np.full(shape, np.nan) for kind in kinds}
    z = {kind: np.full(shape, np.nan) for kind in kinds}
    start = 0
    with torch.no_grad():
        writers = [_writer(view, a, dtype) for a in found]
        for attention in found:
            rows = slice(start, start + attention.heads)
            first = next(i for i, (layer, _) in enumerate(heads) if layer == attention.layer)
            start += attention.heads
            before = [w for w, a in zip(writers, found, strict=True) if a.layer < attention.layer]
            for kind in kinds if before else ():
                reader = _reader(view, attention, kind, dtype)
                told = [_scores(reader, writer) for writer in before]
                scores[kind][:first, rows] = torch.cat([one for one, _ in told]).cpu().numpy()
                z[kind][:first, rows] = torch.cat([one for _, one in told]).cpu().numpy()
    return Composition(heads, scores, z, 1 / math.sqrt(view.width), _LEFT_OUT)


def composition_by_component(
    model: nn.Module | ModelView,
    writer: Head,
    kinds: tuple[str, ...] = KINDS,
    stack: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, dict[Head, np.ndarray]]:
    """For each component s_i u_i v_i^T of a writer's W_OV, the largest first, its composition with
    every later head: kind -> reader -> float64 `(rank,)`, |A u_i| / |A|_F.

    A component turned at random has a mean square of 1 / width here too. Raises as `composition`.
    """
    view, stack = model_view(model), _one_stack(model_view(model), stack)
    layer, head = writer
    found = {a.layer: a for a in view.attentions if a.stack == stack and a.kind == "self"}
    if layer not in found or not 0 <= head < found[layer].heads:
        raise ValueError(f"no head {writer} in stack {stack!r}")
    made: dict[str, dict[Head, np.ndarray]] = {kind: {} for kind in kinds}
    with torch.no_grad():
        u = torch.linalg.svd(_writer(view, found[layer], dtype)[head], full_matrices=False)[0]
        for attention in (a for at, a in found.items() if at > layer):
            for kind in kinds:
                reader = _reader(view, attention, kind, dtype)
                told = (reader @ u).norm(dim=-2) / torch.linalg.matrix_norm(reader)[:, None]
                for h in range(attention.heads):
                    made[kind][attention.layer, h] = told[h].double().cpu().numpy()
    return made


_LEFT_OUT = (
    "MLPs between the heads, and the division by a norm's size",
    "rotary positions: circuits are those at offset 0",
)


def _one_stack(view: ModelView, stack: str | None) -> str:
    if stack is None and len(view.stacks) > 1:
        raise ValueError(f"the model has the stacks {', '.join(view.stacks)}; say stack= which")
    if stack is not None and stack not in view.stacks:
        raise ValueError(f"stack={stack!r}: the model has {', '.join(view.stacks)}")
    return stack or view.stacks[0]


def _writer(view: ModelView, attention: AttentionView, dtype: torch.dtype) -> Tensor:
    """`(heads, width, d)` with the Gram matrix on the left of W_O W_V: W_O L."""
    value, output = value_and_output(view, attention, dtype)
    return output @ _by_head(attention, _small(value.mT).mT)


def _reader(view: ModelView, attention: AttentionView, kind: str, dtype: torch.dtype) -> Tensor:
    """`(heads, d, width)` with the Gram matrix on the right of what reads the residual."""
    if kind == "v":
        value, output = value_and_output(view, attention, dtype)
        return _small(output) @ _by_head(attention, value)
    query, key = query_and_key(attention, dtype)
    key = _by_head(attention, key)
    return _small(query.mT) @ key if kind == "k" else _small(key.mT) @ query


def _small(thin: Tensor) -> Tensor:
    """R `(heads, d, d)` of thin = Q R `(heads, width, d)`."""
    found: Tensor = torch.linalg.qr(thin)[1]
    return found


def _by_head(attention: AttentionView, weight: Tensor) -> Tensor:
    return weight.repeat_interleave(attention.heads // attention.kv_heads, 0)


def _scores(reader: Tensor, writer: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and z `(writers, readers)` of readers `(r, d, width)` and writers `(w, width, e)`."""
    width = reader.shape[-1]
    # one product for all pairs: (r d, width) @ (width, w e)
    both = reader.flatten(0, 1) @ writer.permute(1, 0, 2).flatten(1)
    both = both.view(len(reader), reader.shape[1], len(writer), writer.shape[2])
    square = both.pow(2).sum((1, 3)).mT
    read, read_uneven = _spread(reader, width)
    wrote, wrote_uneven = _spread(writer.mT, width)
    share = square / (wrote[:, None] * read)
    deviation = torch.sqrt(
        2 / ((width - 1) * (width + 2)) * wrote_uneven[:, None] * read_uneven
    ).clamp_min(0)
    z = (share - 1 / width) / deviation
    return share.sqrt().double(), z.double()


def _spread(thin: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """|A|_F^2 of each A `(heads, d, width)`, and |S'|^2 / tr(S)^2 of S = A^T A without its trace:
    what is left of sum s^4 / (sum s^2)^2 of the singular values."""
    small = thin @ thin.mT
    total = small.diagonal(dim1=-2, dim2=-1).sum(-1)
    return total, (small.pow(2).sum((-2, -1)) / total.pow(2) - 1 / width).clamp_min(0)
