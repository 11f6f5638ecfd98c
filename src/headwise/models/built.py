"""Attentions put together from `headwise.parts`, as views and observers see them.

They need no interface to be caught at: each lets watchers look at its scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from headwise.maps import Scores
from headwise.models import interface
from headwise.models.interface import Terms
from headwise.models.places import Places
from headwise.models.projections import READ, Part, Projections, is_projection
from headwise.models.stacks import Place
from headwise.models.structure import AttentionView
from headwise.parts import Attention
from headwise.parts.attention import Seen
from headwise.parts.planner import hidden_map


def is_built(module: nn.Module) -> bool:
    return isinstance(module, Attention)


def describe(module: Attention, place: Place, index: int, stack: str) -> AttentionView:
    """The view of one attention; its map can be observed where it is a softmax of its scores."""
    size = module.size
    hidden = hidden_map(module)
    return AttentionView(
        name=place.name,
        module=module,
        layer=index,
        stack=stack,
        kind="cross" if module.cross else "self",
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        width=size.dim,
        norm=None,
        causal=module.causal,
        projections=_projections(module),
        observable=hidden and f"its map is not a softmax of its scores: {hidden}",
    )


def _projections(module: Attention) -> Projections | str:
    size = module.size
    found: Any = getattr(module.project, "inner", module.project)
    linears: list[Any] = [getattr(found, name, None) for name in ("query", "key", "value")]
    if size.maps > 1 or not all(is_projection(part) for part in linears):
        return f"{type(module.project).__name__} has no single query, key and value matrix a head"
    query, key, value = linears
    read: tuple[int, ...] | None = getattr(module.project, READ, None)
    stored = size.kv_heads if read is None else max(read) + 1
    return Projections(
        Part(query, size.heads, size.head_dim),
        Part(key, stored, size.head_dim, read=read),
        Part(value, stored, size.value_dim, read=read),
        module.merge.linear,
    )


def watch(module: Attention, see: Callable[[Seen], None]) -> Callable[[], None]:
    """Hand every call to `see`; the answer ends that."""
    module.watchers.append(see)
    return lambda: module.watchers.remove(see)


def edited(
    module: Attention, scores: Scores, v: Tensor, keys: Tensor | None, numbers: tuple[int, int]
) -> tuple[Tensor, Scores, Tensor] | None:
    """What who edits this module makes of a call; None where nobody does. See `Attention.editor`.

    Raises ValueError for an attention that drops out weights.
    """
    editor = interface.EDITORS.get(id(module))  # None for a copy of a model that is edited
    if editor is None or not editor.active(module):
        return None
    if module.training and module.dropout:
        raise ValueError(
            f"{type(module).__name__} drops out attention weights (it is in training mode), so "
            "its map changes from call to call: call model.eval() first"
        )
    first = None
    if keys is not None and not module.cross:
        # what lies in front of the first real token is padding
        leading = keys.int().argmax(1)
        first = leading if bool(leading.any()) else None
    places = Places(*numbers, first)
    s = scores
    terms = Terms(s.pattern, s.scale, s.bias, s.sinks, s.softcap, keys, places)
    done = editor.attend(s.q, s.k, v, terms, bool(module.watchers))
    t = done.terms
    made = Scores.of(done.query, done.key, t.pattern, t.scale, t.bias, t.sinks, t.softcap)
    return done.out, made, done.value
