"""The maps of a whole pass, kept as queries and keys, with the positions that the answer is read
from: what methods need that go down from the answer, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from headwise.instruments.metrics import Inputs, Metric
from headwise.maps import AttentionMap
from headwise.models import AttentionReading, AttentionView, ModelView, UnsupportedModelError
from headwise.models.observation import observe
from headwise.models.prefix import logits_of
from headwise.models.sites import Site, touching

__all__ = [
    "Kept",
    "check_stacks",
    "keep",
    "keeping",
    "read_from",
    "read_site",
    "run_read",
    "stack_read",
    "wanted_stack",
]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Kept:
    """One attention of the pass: `map`; `value` `(batch, kv_heads, n_k, value_dim)` and `out`
    `(batch, heads, n_q, value_dim)`, which share their memory with the model's own."""

    attention: AttentionView
    map: AttentionMap
    value: Tensor
    out: Tensor


@contextmanager
def keeping(view: ModelView, batch: int) -> Iterator[list[Kept]]:
    """A list of what every attention computed in the last pass, in order of execution.

    Raises UnsupportedModelError for an attention whose rows are not the batch's (windows that
    are folded into it), during the pass.
    """
    kept: list[Kept] = []

    def read(seen: AttentionReading) -> None:
        rows = seen.map.scores.batch
        if rows != batch:
            raise UnsupportedModelError(
                f"{seen.attention.name} attends within {rows} groups for {batch} examples: its map "
                "is not one from positions to positions, and is not followed"
            )
        kept.append(Kept(seen.attention, seen.map, seen.value, seen.out))

    with observe(view, read):
        yield kept


def keep(
    view: ModelView, inputs: Inputs, metric: Metric, at: Tensor | int | None = None
) -> tuple[list[Kept], Tensor]:
    """All maps of one pass, and `(batch, n)` weights that sum to one: the positions of the last
    layer that the answer is read from (see `read_from`). Without a graph of the layers.

    `at`: the position to read from instead, one for all or `(batch,)`.
    """
    check_stacks(view)
    batch = next(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim())
    return run_read(view, inputs, metric, read_site(view), keeping(view, batch), at)


def run_read(
    view: ModelView,
    inputs: Inputs,
    metric: Metric,
    site: Site,
    keeping: AbstractContextManager[T],
    at: Tensor | int | None = None,
) -> tuple[T, Tensor]:
    """Run the model once inside of `keeping`: what that keeps, and the weights `(batch, n)` of the
    positions at a residual site that the answer is read from. Below the site there is no graph."""
    leaf: list[Tensor] = []
    was = torch.is_grad_enabled()

    def cut(stream: Tensor) -> Tensor:
        leaf[:] = [stream.detach().requires_grad_()]
        torch.set_grad_enabled(at is None)  # the layers below need no graph, what follows does
        return leaf[0]

    try:
        with torch.no_grad(), keeping as kept, touching(view, {site: cut}):
            output = view.model(**inputs)
            if at is not None:
                return kept, read_from(leaf[0], at)
            with torch.enable_grad():
                score = metric.score(logits_of(output), inputs).sum()
                gradient = _gradient(score, leaf[0], site)
    finally:
        torch.set_grad_enabled(was)
    return kept, read_from(gradient)


def read_from(gradient: Tensor, at: Tensor | int | None = None) -> Tensor:
    """Weights `(batch, n)` of the positions that an answer is read from: the norms of its gradient
    in the last layer's output `(batch, n, width)`, as shares. One position where there is one (a
    class token, the last token of a text), all evenly under mean pooling of equal states.

    at: that position alone, one for all or `(batch,)`. Raises ValueError for an example whose
    answer reads nothing, and for a position outside.
    """
    if at is not None:
        return _one_hot(at, gradient)
    norms = gradient.float().norm(dim=-1)
    whole = norms.sum(-1, keepdim=True)
    if bool((whole == 0).any()):
        raise ValueError(
            "the target does not depend on the last layer of the model for every example; give "
            "another target, or the position to read from as at="
        )
    return norms / whole


def check_stacks(view: ModelView) -> None:
    """Raises UnsupportedModelError where several stacks are not joined by cross-attention."""
    joined = any(a.kind == "cross" for a in view.attentions)
    if len(view.stacks) > 1 and not (joined and len(view.stacks) == 2):
        raise UnsupportedModelError(
            f"{type(view.model).__name__} has the stacks {', '.join(view.stacks)}; relevance is "
            "followed through one stack, or from a decoder into the encoder that it attends to"
        )


def stack_read(view: ModelView) -> str:
    """The stack that the answer is read from: the last one."""
    return view.stacks[-1]


def wanted_stack(view: ModelView, of: str | None) -> str:
    """The stack whose input positions are scored: `of`, or the first one.

    Raises ValueError for a stack that is not there.
    """
    if of is not None and of not in view.stacks:
        raise ValueError(f"of={of!r}: the model has the stacks {', '.join(view.stacks)}")
    return of or view.stacks[0]


def read_site(view: ModelView) -> Site:
    """What the last layer of that stack leaves."""
    stack = stack_read(view)
    last = [layer for layer in view.layers if layer.stack == stack][-1]
    return Site("residual", last.index + 1, stack)


def _gradient(score: Any, leaf: Tensor, site: Site) -> Tensor:
    if not score.requires_grad:
        raise ValueError(
            f"the target has no gradient in the last layer's output ({site}); give another target, "
            "or the position to read from as at="
        )
    (found,) = torch.autograd.grad(score, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def _one_hot(at: Tensor | int, stream: Tensor) -> Tensor:
    batch, n = stream.shape[:2]
    where = torch.as_tensor(at, device=stream.device).expand(batch)
    where = torch.where(where < 0, where + n, where)
    if bool(((where < 0) | (where >= n)).any()):
        raise ValueError(f"at={at} is outside of the {n} positions of the last layer")
    return torch.nn.functional.one_hot(where.long(), n).float()
