"""The tables between tokens and the residual stream: what feeds a stack, and what gives logits."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from headwise.models.structure import ModelView

__all__ = ["embedding_table", "speaking_stack", "unembedding_table"]


def speaking_stack(view: ModelView) -> str:
    """The stack whose residual is unembedded: decoder or text, else the last."""
    return next((s for s in ("decoder", "text") if s in view.stacks), view.stacks[-1])


def embedding_table(view: ModelView, stack: str) -> Tensor | str:
    """The (vocab, width) table of tokens that feeds a stack, or the reason why there is none."""
    for table in _tables(view, stack, stack == speaking_stack(view)):
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
