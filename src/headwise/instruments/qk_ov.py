"""The two circuits of a head, as matrices of a head's rank that are never multiplied out.

After Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "QK and OV circuits":

    OV = W_O W_V            (width, in_width)   what attending to a residual x adds: OV x
    QK = W_Q^T T W_K        (width, in_width)   the score of a query x for a key y: x^T QK y

with the norms' gains and centring folded in (`folded.py`), and T what the rotary embedding does
to a pair at a given offset. What is left out is not linear: the division of x by its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from headwise.instruments.examples import model_view
from headwise.instruments.factored import Factored
from headwise.instruments.folded import (
    attention_at,
    query_and_key,
    query_and_key_bias,
    value_and_output,
    value_bias,
)
from headwise.instruments.turning import turned_between, turns
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.structure import AttentionView
from headwise.parts import Attention
from headwise.parts.slots import Position

__all__ = ["Circuit", "ov", "qk"]


@dataclass(frozen=True, eq=False)
class Circuit(Factored):
    """A head's matrix, and what a matrix cannot say.

    bias: of OV `(width,)`, what the head adds wherever it looks; of QK `(in_width,)`, b with b^T y
    in the score of key y whatever the query asks (what is the same for all keys is left out: the
    softmax does not see it). None where nothing is added. left_out: what is not in the matrix, one
    sentence each.
    """

    bias: Tensor | None = None
    left_out: tuple[str, ...] = field(default=())


def ov(
    model: nn.Module | ModelView,
    layer: int,
    head: int,
    stack: str | None = None,
    attention: str = "self",
    dtype: torch.dtype = torch.float64,
) -> Circuit:
    """W_O W_V of one head: left `(width, value_dim)`, right `(value_dim, in_width)`.

    stack: where the model has several; attention: "self" or "cross". Raises ValueError for a head
    that is not there, UnsupportedModelError where its weights or the norms' gains are not known.
    """
    view = model_view(model)
    found = attention_at(view, layer, stack, attention)
    group = _group(found, head)
    value, output = value_and_output(view, found, dtype)
    bias = output[head] @ value_bias(found, dtype)[group]
    left_out = () if found.norm is None else (_division(found, "what is attended to"),)
    return Circuit(output[head], value[group], _or_none(bias), left_out)


def qk(
    model: nn.Module | ModelView,
    layer: int,
    head: int,
    offset: int = 0,
    stack: str | None = None,
    attention: str = "self",
    dtype: torch.dtype = torch.float64,
) -> Circuit:
    """W_Q^T W_K of one head, before the scale: left `(width, head_dim)`, right `(head_dim,
    in_width)`.

    offset: how many tokens the key stands before the query; rotary embeddings are as they are at
    that offset, 0 being the place itself, where nothing is turned. Positions that are added to
    tokens are part of x and y.

    Raises ValueError for a head that is not there and for an offset in a model without rotary
    positions, UnsupportedModelError where weights, gains or the rotation are not known.
    """
    view = model_view(model)
    found = attention_at(view, layer, stack, attention)
    group = _group(found, head)
    query, key = query_and_key(found, dtype)
    bias = query_and_key_bias(found, dtype)[0][head]
    rotary = turns(view, found)
    left = query[head].mT
    if offset and not rotary:
        raise ValueError(
            f"offset={offset}: {found.name} does not turn queries and keys by their positions, so "
            "its QK circuit is the same at every offset; leave offset= out"
        )
    left_out = [] if found.norm is None else [_division(found, "query and key")]
    if rotary:
        left_out.append(f"rotary positions: this is the circuit at offset {offset}")
        try:
            turned = turned_between(view, found, offset).to(left)
        except UnsupportedModelError as error:
            if offset:
                raise
            left_out.append(f"a factor that stretched positions may come with: {error}")
        else:
            left, bias = left @ turned, bias @ turned
        if bool(query_and_key_bias(found, dtype)[1].any()):
            left_out.append("the bias of keys, whose score depends on query and offset alone")
    elif isinstance(found.module, Attention) and type(found.module.position) is not Position:
        left_out.append(f"{found.module.position!r}, which no product of weights describes")
    return Circuit(left, key[group], _or_none(bias @ key[group]), tuple(left_out))


def _group(found: AttentionView, head: int) -> int:
    """The key-value head of a query head."""
    if not 0 <= head < found.heads:
        raise ValueError(f"head={head}: {found.name} has heads 0 to {found.heads - 1}")
    return head // (found.heads // found.kv_heads)


def _division(found: AttentionView, what: str) -> str:
    return f"{type(found.norm).__name__} divides {what} by its size, one number a token"


def _or_none(bias: Tensor) -> Tensor | None:
    return bias if bool(bias.any()) else None
