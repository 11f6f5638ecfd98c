"""Heads with the same changes are computed together, each group as what it has become.

So a head with a window costs a window, whatever the other heads of its layer do.
"""

from __future__ import annotations

from torch import Tensor

from headwise.edits.change import Call, Change
from headwise.edits.joined import joined
from headwise.edits.room import without_room
from headwise.maps import attend
from headwise.maps.per_head import (
    bias_of_heads,
    keys_of_heads,
    pattern_of_heads,
    put_together,
    take,
)
from headwise.models.errors import UnsupportedModelError
from headwise.models.interface import Attended, Terms
from headwise.models.structure import AttentionView

FEW = 8
"""With at most so many queries, heads without changes are computed beside the others."""

Changes = dict[int, tuple[Change, ...]]
"""head -> its changes, in the order in which they apply; heads without any are left out."""


def attend_changed(
    attention: AttentionView,
    changes: Changes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    whole: bool,
) -> Attended:
    """The attention `(batch, heads, n_q, d_v)` with its changes; shapes as in `maps.attend`.

    `whole`: queries, keys, values, terms and log-sum-exps of all heads together are wanted too.
    """
    if attention.kind == "self":
        key, value, terms = without_room(query, key, value, terms)
    calls, outs, sums = [], [], []
    everybody = tuple(range(query.shape[1]))
    for heads, changed in _groups(query.shape[1], changes):
        # few queries read their keys once: leaving some heads out would cost a copy of the rest
        along = not changed and not whole and query.shape[2] <= FEW
        asked = everybody if along else heads
        given = call = _taken(attention, asked, query, key, value, terms)
        for change in changed:
            call = _checked(change, call, change.before(call))
        if whole and (hiding := [change for change in changed if change.hides_map]):
            raise UnsupportedModelError(
                f"{attention.name}: {hiding[0]!r} gives what no map of queries and keys gives, so "
                "its map cannot be observed; observe the model without this change"
            )
        if not whole and any(change.discards for change in changed):
            shape = (*call.query.shape[:3], call.value.shape[-1])
            out, lse = call.query.new_zeros(shape), call.query.new_zeros(0)
        else:
            out, lse = attend(
                call.query,
                call.key,
                call.value,
                call.pattern,
                call.scale,
                call.bias,
                call.sinks,
                call.softcap,
                need_lse=whole,
            )
        if along:
            call, out = call.but(heads=heads), take(out, heads)
        for change in changed:
            made = change.after(call, out)
            if made.shape != out.shape:
                raise ValueError(
                    f"{change!r} turned outputs {tuple(out.shape)} into {tuple(made.shape)}; "
                    "expected the same shape"
                )
            out = made
        calls.append((given, call))
        outs.append(out)
        sums.append(lse)
    order = [call.heads for _, call in calls]
    out = put_together(outs, order)
    if not whole:
        return Attended(out, sums[0], query, key, value, terms)
    lse = put_together(sums, order)
    return joined(calls, out, lse, query, key, value, terms)


def _groups(heads: int, changes: Changes) -> list[tuple[tuple[int, ...], tuple[Change, ...]]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for head in range(heads):
        same = tuple(id(change) for change in changes.get(head, ()))
        found.setdefault(same, []).append(head)
    return [(tuple(group), changes.get(group[0], ())) for group in found.values()]


def _taken(
    attention: AttentionView,
    heads: tuple[int, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
) -> Call:
    """These heads' part of a call. Keys are copied only where heads leave irregular gaps."""
    scale = query.shape[-1] ** -0.5 if terms.scale is None else terms.scale
    pattern, bias, sinks = terms.pattern, terms.bias, terms.sinks
    count = query.shape[1]
    if len(heads) < count:
        kv = keys_of_heads(heads, count // key.shape[1])
        query, key, value = take(query, heads), take(key, kv), take(value, kv)
        pattern = pattern_of_heads(pattern, heads)
        bias = bias_of_heads(bias, heads)
        sinks = None if sinks is None else sinks[list(heads)]
    return Call(
        attention, heads, query, key, value, pattern, scale, bias, sinks, terms.softcap,
        terms.places,
    )  # fmt: skip


def _checked(change: Change, given: Call, made: Call) -> Call:
    if not isinstance(made, Call):
        raise TypeError(
            f"{change!r}: before(call) gave {type(made).__name__}; return call.but(...), or call"
        )
    if (made.n_q, made.n_k, made.query.shape[1], made.value.shape[2]) != (
        given.n_q,
        given.n_k,
        given.query.shape[1],
        given.n_k,
    ):
        raise ValueError(
            f"{change!r} made queries {tuple(made.query.shape)}, keys {tuple(made.key.shape)} and "
            f"values {tuple(made.value.shape)} of {tuple(given.query.shape)}, "
            f"{tuple(given.key.shape)} and {tuple(given.value.shape)}; heads, queries and keys "
            "must stay as many as they are"
        )
    return made
