"""One attention out of groups of heads that were computed differently, for those who look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.edits.change import Call
from headwise.maps import Bias, Pattern, PerHead
from headwise.maps.ranges import KeyRanges
from headwise.models.errors import UnsupportedModelError
from headwise.models.interface import Attended, Terms


@dataclass(frozen=True, eq=False)
class ByGroup(Pattern):
    """`PerHead` where a group's pattern differs by head itself: head h goes by
    `patterns[group[h]]`, which is asked by its number in the group, `inside[h]`."""

    patterns: tuple[Pattern, ...]
    group: tuple[int, ...]
    inside: tuple[int, ...]

    @property
    def by_batch(self) -> bool:
        return any(pattern.by_batch for pattern in self.patterns)

    @property
    def by_head(self) -> bool:
        return True

    def allowed(
        self, i: Tensor, j: Tensor, batch: Tensor | None = None, head: Tensor | None = None
    ) -> Tensor:
        if head is None:
            raise ValueError("ByGroup differs between heads: say which with head=")
        group = torch.tensor(self.group, device=head.device)[head]
        inside = torch.tensor(self.inside, device=head.device)[head]
        found = torch.zeros((), dtype=torch.bool, device=i.device)
        for number, pattern in enumerate(self.patterns):
            # a number inside another group may be too large for this one
            own = torch.where(group == number, inside, 0)
            found = found | ((group == number) & pattern.allowed(i, j, batch, own))
        return found

    def ranges(self, start: int, stop: int, n_k: int) -> KeyRanges:
        first, *others = (pattern.ranges(start, stop, n_k) for pattern in self.patterns)
        for other in others:
            first = KeyRanges(first.either(other, n_k).possible, first.both(other).certain)
        return first


@dataclass(frozen=True, eq=False)
class BiasByGroup:
    """Biases by position of groups of heads, as one of all heads."""

    biases: tuple[Bias | None, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def tile(self, i: Tensor, j: Tensor) -> Tensor:
        zero = torch.zeros((1, len(i), len(j)), device=i.device)
        tables = (zero if bias is None else bias.tile(i, j) for bias in self.biases)
        pairs = zip(tables, self.sizes, strict=True)
        return torch.cat([t.expand(n, -1, -1) for t, n in pairs])[list(self.order)]


def joined(
    calls: Sequence[tuple[Call, Call]],
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
) -> Attended:
    """`calls`: of each group what it was given and what was computed; the others are of all heads,
    `query`, `key`, `value` and `terms` as they were before any change.

    Raises UnsupportedModelError where heads were given different soft-caps: a map has one.
    """
    made = [call for _, call in calls]
    heads = [h for call in made for h in call.heads]
    order = [heads.index(h) for h in range(len(heads))]  # where each head is among the groups
    caps = {call.softcap for call in made}
    if len(caps) > 1:
        raise UnsupportedModelError(
            f"{made[0].attention.name}: its heads have different soft-caps now ({caps}), and what "
            "observes it takes one for all: change all heads of the layer alike, or do not observe"
        )
    scale = query.shape[-1] ** -0.5 if terms.scale is None else terms.scale
    if len({call.scale for call in made}) == 1:
        scale = made[0].scale
    queries = [
        call.query if call.scale == scale else call.query * (call.scale / scale) for call in made
    ]
    widths = [q.shape[-1] for q in queries]
    if len(set(widths)) > 1:  # coordinates that some heads have more than others
        queries = [F.pad(q, (0, max(widths) - q.shape[-1])) for q in queries]
    if any(a.key is not b.key or a.value is not b.value for a, b in calls):
        keys = [_for_each(call.key, call) for call in made]
        keys = [F.pad(k, (0, max(widths) - k.shape[-1])) for k in keys]
        key = torch.cat(keys, 1)[:, order]
        value = torch.cat([_for_each(call.value, call) for call in made], 1)[:, order]
    sinks = None
    if any(call.sinks is not None for call in made):
        none = query.new_full((), float("-inf"))
        each = [(none if c.sinks is None else c.sinks).expand(len(c.heads)) for c in made]
        sinks = torch.cat([logits.to(query.dtype) for logits in each])[order]
    shown = Terms(
        pattern=_pattern(made, order),
        scale=scale,
        bias=_bias(made, order),
        sinks=sinks,
        softcap=made[0].softcap,
        keys=terms.keys,
        places=terms.places,
    )
    return Attended(out, lse, torch.cat(queries, 1)[:, order], key, value, shown)


def _for_each(x: Tensor, call: Call) -> Tensor:
    """Keys or values with one head for every query head of the call."""
    return x.repeat_interleave(len(call.heads) // x.shape[1], 1)


def _pattern(calls: Sequence[Call], order: Sequence[int]) -> Pattern:
    first = calls[0].pattern
    if len(calls) == 1 or all(not c.pattern.by_head and c.pattern == first for c in calls):
        return first
    if not any(c.pattern.by_head for c in calls):
        each = [c.pattern for c in calls for _ in c.heads]
        return PerHead([each[at] for at in order])
    places = [(number, t) for number, c in enumerate(calls) for t in range(len(c.heads))]
    group, inside = zip(*(places[at] for at in order), strict=True)
    return ByGroup(tuple(c.pattern for c in calls), group, inside)


def _bias(calls: Sequence[Call], order: Sequence[int]) -> Tensor | Bias | None:
    biases = [call.bias for call in calls]
    if len(calls) == 1 or all(bias is None for bias in biases):
        return biases[0]
    sizes = tuple(len(call.heads) for call in calls)
    by_position: list[Bias | None] = [b for b in biases if not isinstance(b, Tensor)]
    if len(by_position) == len(biases):
        return BiasByGroup(tuple(by_position), sizes, tuple(order))
    n_q, n_k, device = calls[0].n_q, calls[0].n_k, calls[0].query.device
    j = torch.arange(n_k, device=device)
    tables = []
    for bias in biases:
        if bias is None:
            tables.append(calls[0].query.new_zeros((1, 1, 1, 1)))
        elif isinstance(bias, Tensor):
            tables.append(bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)))
        else:
            tables.append(bias.tile(j[n_k - n_q :], j)[None])
    b, q, k = (max(table.shape[axis] for table in tables) for axis in (0, 2, 3))
    wide = [t.expand(b, n, q, k) for t, n in zip(tables, sizes, strict=True)]
    return torch.cat([t.to(calls[0].query.dtype) for t in wide], 1)[:, list(order)]
