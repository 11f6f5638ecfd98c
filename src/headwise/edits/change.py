"""What a change of some heads is, and the one call of an attention that it may change.

A change of your own is a class with one or both of two hooks:

    class Sharper(Change):
        def before(self, call):
            return call.but(scale=2 * call.scale)

    with headwise.swap(model, {(3, 1): Sharper()}): ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.edits.moved import moved, moved_bias
from headwise.maps import Bias, Pattern
from headwise.models.places import Places
from headwise.models.structure import AttentionView
from headwise.parts.bias import SumBias


@dataclass(frozen=True, eq=False)
class Call:
    """Some heads of one attention, once: what goes into softmax(softcap(scale q.k) + bias) v.

    attention: where it is. heads: which of its query heads. query `(batch, heads, n_q, d)`, after
    rotary embedding; key, value `(batch, kv_heads, n_k, d)`: query head t of the call reads
    key-value head t // (heads // kv_heads). pattern: who may look at whom, with padding, by
    position in this call (see `headwise.maps`). bias: a tensor that broadcasts to `(batch, heads,
    n_q, n_k)`, an object by position, or None. sinks: `(heads,)`, one learned logit a head, or
    None. places: which tokens the queries and keys are.
    """

    attention: AttentionView
    heads: tuple[int, ...]
    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern
    scale: float
    bias: Tensor | Bias | None
    sinks: Tensor | None
    softcap: float | None
    places: Places

    @property
    def n_q(self) -> int:
        return self.query.shape[2]

    @property
    def n_k(self) -> int:
        return self.key.shape[2]

    def but(self, **fields: Any) -> Call:
        """The same call with other fields."""
        return replace(self, **fields)

    def narrowed(self, pattern: Pattern) -> Call:
        """A call that may look only where `pattern`, which counts tokens and the attention's
        heads, allows as well."""
        here = moved(pattern, self.places, self.n_q, self.n_k, self.heads)
        return self.but(pattern=self.pattern & here)

    def biased(self, bias: Tensor | Bias) -> Call:
        """A call with more added to its scores: a tensor that broadcasts to `(batch, heads, n_q,
        n_k)`, or an object that counts tokens and the attention's heads."""
        more: Tensor | Bias = bias
        if not isinstance(bias, Tensor):
            more = moved_bias(bias, self.places, self.n_q, self.n_k, self.heads, self.query.device)
        if self.bias is None:
            return self.but(bias=more)
        if not isinstance(self.bias, Tensor) and not isinstance(more, Tensor):
            return self.but(bias=SumBias(self.bias, more))
        return self.but(bias=self._table(self.bias) + self._table(more))

    def _table(self, bias: Tensor | Bias) -> Tensor:
        if isinstance(bias, Tensor):
            return bias
        j = torch.arange(self.n_k, device=self.query.device)
        return bias.tile(j[self.n_k - self.n_q :], j).to(self.query.dtype)


class Change:
    """What happens to some heads of an attention. Override the hooks that are needed.

    Hooks run at every call, for prefill and for every decoded token, with the chosen heads
    together. They must not keep tensors of one sequence for the next call: a beam search exchanges
    sequences between calls.

    `discards`: `after` does not look at what the heads gave, which is then not computed (zeros are
    handed over) unless somebody observes it. `hides_map`: `after` gives what no map of `call`
    gives, so that observing these heads is refused instead of showing another map.
    """

    discards = False
    hides_map = False

    def check(self, attention: AttentionView, heads: tuple[int, ...]) -> None:
        """Raise ValueError, with the reason, where this cannot be done to these heads. Asked
        before anything is changed."""

    def before(self, call: Call) -> Call:
        """What is computed instead of `call`: other queries, keys, values, pattern or scores.
        The numbers of queries and keys stay."""
        return call

    def after(self, call: Call, out: Tensor) -> Tensor:
        """The heads' outputs `(batch, heads, n_q, d_v)` instead of `out`, before the output
        projection. `call` is what was computed."""
        return out

    def __repr__(self) -> str:
        held = (f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(held)})"
