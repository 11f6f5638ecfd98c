"""Induction, from the weights: does the reader look for the token that the writer moved?

Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "How induction heads work":
a head that writes the previous token, W_OV, and one whose keys read it, W_QK, make the score
x^T W_QK W_OV y of a query token x for a key that stands behind y. It is an induction circuit where
x = y stands out. Composition scores are ratios: a circuit that training has shrunk to nothing
keeps its score and loses its effect. So here the advantage of x = y is told as a score, in logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headwise.instruments.composition_scores import Head
from headwise.instruments.examples import model_view
from headwise.instruments.folded import query_and_key, value_and_output
from headwise.instruments.readout import output_stack
from headwise.instruments.token_tables import as_read, embedding_table
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.structure import AttentionView

__all__ = ["Match", "token_matching"]

_ROWS = 16384


class Match(NamedTuple):
    """writer, reader: (layer, head). logits: mean score of equal tokens minus that of others."""

    writer: Head
    reader: Head
    logits: float


def token_matching(
    model: nn.Module | ModelView,
    stack: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Match]:
    """For all pairs of heads, the writer in an earlier layer, how much more a query token x
    attends to a key behind x than behind another token, the largest first.

        mean_x s(x, x) - mean over x /= y of s(x, y),   s = e_x^T W_QK W_OV e_y / sqrt(head_dim)

    e_x is the embedding of x, divided by its size where a norm feeds the heads; the writer is
    taken to attend to the previous token with all its weight. Computed by traces of head_dim by
    head_dim products through the tables' Gram matrix; about 2 (heads head_dim)^2 width operations.

    Left out: what other layers add to the residual (in models with norms it makes these logits
    smaller; where earlier heads turn what the query says of its token around, an induction circuit
    has a large negative number), positions (rotary: the score at offset 0), biases.

    Raises ValueError where a stack must be said, UnsupportedModelError where there are no tokens,
    weights or gains.
    """
    view = model_view(model)
    stack = stack or output_stack(view)
    table = embedding_table(view, stack)
    if isinstance(table, str):
        raise UnsupportedModelError(f"token_matching: {table}")
    found = [a for a in view.attentions if a.stack == stack and a.kind == "self"]
    with torch.no_grad():
        rows = _Rows(table, found[0], dtype)
        writers = {
            id(a): [_by_head(a, part) for part in value_and_output(view, a, dtype)] for a in found
        }
        made: list[Match] = []
        for attention in found:
            earlier = [a for a in found if a.layer < attention.layer]
            if not earlier:
                continue
            query, key = query_and_key(attention, dtype)
            key = _by_head(attention, key) * _scale(attention)
            asked, sums = query @ rows.gram, query @ rows.total
            for writer in earlier:
                value, output = writers[id(writer)]
                # tr(E Q^T K O V E^T) = <K O, (V E^T E Q^T)^T>, for each reader r and writer w
                read = torch.einsum("rdn,wne->rwde", key, output)
                same = (read * torch.einsum("rdn,wen->rwde", asked, value)).sum((-2, -1))
                every = torch.einsum("rd,rwde,we->rw", sums, read, value @ rows.total)
                count = rows.count
                told = same / count - (every - same) / (count * (count - 1))
                made += [
                    Match((writer.layer, w), (attention.layer, r), float(told[r, w]))
                    for r in range(attention.heads)
                    for w in range(writer.heads)
                ]
    return sorted(made, key=lambda match: -match.logits)


class _Rows:
    """Sums over a table of tokens: the Gram matrix `(width, width)` and the total `(width,)`."""

    def __init__(self, table: Tensor, reader: AttentionView, dtype: torch.dtype) -> None:
        self.count, width = table.shape
        self.gram = torch.zeros(width, width, dtype=dtype, device=table.device)
        self.total = torch.zeros(width, dtype=dtype, device=table.device)
        for part in table.split(_ROWS):
            rows = as_read(part.to(dtype), reader)
            self.gram += rows.mT @ rows
            self.total += rows.sum(0)


def _by_head(attention: AttentionView, weight: Tensor) -> Tensor:
    repeats = attention.heads // len(weight) if len(weight) != attention.heads else 1
    return weight.repeat_interleave(repeats, 0)


def _scale(attention: AttentionView) -> float:
    told = getattr(attention.module, "scaling", None)
    return float(told) if isinstance(told, float) else 1 / math.sqrt(attention.head_dim)
