"""The tables between tokens and the residual stream: what feeds a stack, and what gives logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from headwise.instruments.folded import input_gain
from headwise.instruments.gains import Gain, find_gain
from headwise.instruments.readout import output_stack
from headwise.models.errors import UnsupportedModelError
from headwise.models.structure import AttentionView, ModelView

__all__ = ["as_read", "embedding_table", "linear_head", "unembedding_table"]


def embedding_table(view: ModelView, stack: str) -> Tensor | str:
    """The (vocab, width) table of tokens that feeds a stack, or the reason why there is none."""
    for table in _tables(view, stack, stack == output_stack(view)):
        if isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == view.width:
            return table
    return f"no embedding of tokens at the width of stack {stack}"


def unembedding_table(view: ModelView) -> Tensor | str:
    """The (vocab, width) table that gives logits, or the reason why none does so linearly."""
    if view.unembedding is None:
        return f"{type(view.model).__name__} has no unembedding of its width"
    if not view.causal:
        return (
            f"the head of {type(view.model).__name__} transforms the residual "
            "before it unembeds it, which no product of weights describes"
        )
    return view.unembedding


def linear_head(view: ModelView) -> tuple[Tensor, Gain]:
    """The (vocab, width) table that gives logits, and the gain of the norm before it.

    Raises UnsupportedModelError, with the reason, where logits are not linear in what is normed.
    """
    table, final = unembedding_table(view), find_gain(view.final_norm, view.width)
    if isinstance(table, str):
        raise UnsupportedModelError(table)
    if isinstance(final, str):
        raise UnsupportedModelError(final)
    return table, final


def as_read(rows: Tensor, attention: AttentionView) -> Tensor:
    """Rows of a table `(tokens, width)`, divided by their sizes where a norm feeds the attention:
    what it would read of a token alone, but for the gain, which stands in its weights."""
    if attention.norm is None or isinstance(attention.norm, nn.Identity):
        return rows
    centred = input_gain(attention, rows.shape[-1]).centred
    middle = rows - rows.mean(-1, keepdim=True) if centred else rows
    size = middle.pow(2).mean(-1, keepdim=True).sqrt()
    # a token that was never trained may be all zeros
    return rows / size.clamp_min(torch.finfo(rows.dtype).tiny)


def _tables(view: ModelView, stack: str, speaks: bool) -> Iterator[Tensor | None]:
    getter = getattr(view.owners.get(stack), "get_input_embeddings", None)
    if getter is not None and not speaks:
        try:
            module = getter()
        except NotImplementedError:  # a stack that is fed something else than tokens
            module = None
        yield module.weight if isinstance(module, nn.Embedding) else None
    if speaks:
        yield view.embedding
