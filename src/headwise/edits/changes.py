"""Changes that need no training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.edits.change import Call, Change
from headwise.edits.product import scaled
from headwise.maps import And, Bias, Documents, Full, KeyMask, Padding, Pattern, Window
from headwise.maps.per_head import pattern_of_heads
from headwise.models.errors import UnsupportedModelError
from headwise.models.structure import AttentionView


def _needs_distances(change: Change, attention: AttentionView) -> None:
    if attention.kind == "cross":
        raise ValueError(
            f"{change!r} goes by the distance of query and key, which the cross-attention "
            f"{attention.name} does not have (its keys are another sequence); choose self-attention"
        )


@dataclass(frozen=True, eq=False)
class UsePattern(Change):
    """The heads see only what `pattern` allows, of what they may see.

    The pattern counts tokens, from the first real one of each sequence; a pattern that differs by
    head is asked by the head's number in its layer. In cross-attention it may go by the key only.

    `replace`: what the model's own causality and windows forbid may be seen too, so that a causal
    model reads a prompt in both directions (padding and documents stay). A model that generates
    then sees later prompts only as far as they are given: with a cache, earlier tokens were read
    without the later ones. A call raises UnsupportedModelError where the model hands over a mask
    of which it is not known what of it is causality.
    """

    pattern: Pattern
    replace: bool = False

    def check(self, attention: AttentionView, heads: tuple[int, ...]) -> None:
        own = pattern_of_heads(self.pattern, heads)  # raises where one of them has none
        if attention.kind == "cross" and _by_query(own, len(heads)):
            _needs_distances(self, attention)

    def before(self, call: Call) -> Call:
        if not self.replace:
            return call.narrowed(self.pattern)
        kept = _without_bands(call.pattern, call)
        return call.but(pattern=kept).narrowed(self.pattern)

    def __repr__(self) -> str:
        return f"UsePattern({self.pattern!r}, replace=True)" if self.replace else repr(self.pattern)


def _without_bands(pattern: Pattern, call: Call) -> Pattern:
    if isinstance(pattern, And):
        return _without_bands(pattern.a, call) & _without_bands(pattern.b, call)
    if isinstance(pattern, Full | Window):
        return Full()
    if isinstance(pattern, Padding | KeyMask | Documents):
        return pattern
    raise UnsupportedModelError(
        f"{call.attention.name} is given the mask {pattern!r}: what of it is causality, and may "
        "be replaced, is not known; a pattern without replace=True can be used"
    )


def _by_query(pattern: Pattern, heads: int) -> bool:
    """Whether the pattern gives different queries different keys, as far as 64 tokens tell."""
    i, h = torch.arange(64), torch.arange(heads)
    try:
        table = pattern.allowed(i[:, None], i[None], torch.tensor(0), h[:, None, None])
    except (IndexError, RuntimeError):  # a table of another size
        return True
    return not bool((table == table[..., :1, :]).all())


@dataclass(frozen=True, eq=False)
class Choose(Change):
    """The heads see what is chosen from queries and keys, of what they may see.

    `choice(q, k, pattern, scale) -> Pattern`, as `headwise.parts` has them: q `(batch, heads, n_q,
    d)`, k `(batch, kv_heads, n_k, d)` of the chosen heads; the pattern over them, by position in
    the call. Decoding asks it for every token.
    """

    choice: Callable[[Tensor, Tensor, Pattern, float], Pattern]

    def before(self, call: Call) -> Call:
        with torch.no_grad():
            found = self.choice(call.query, call.key, call.pattern, call.scale)
        if not isinstance(found, Pattern):
            raise TypeError(
                f"{self.choice!r} gave a {type(found).__name__}; a choice gives a Pattern"
            )
        return call.but(pattern=call.pattern & found)

    def __repr__(self) -> str:
        return f"Choose({getattr(self.choice, '__name__', repr(self.choice))})"


@dataclass(frozen=True, eq=False)
class Temperature(Change):
    """Everything that the softmax is taken of is divided by `t`: soft-capped products, bias and
    learned sinks. Above 1 the weights are flatter. Raises ValueError unless t > 0."""

    t: float

    def __post_init__(self) -> None:
        if not self.t > 0:
            raise ValueError(f"Temperature({self.t}): give more than 0 (Uniform() is the limit)")

    def before(self, call: Call) -> Call:
        # cap/t tanh(s/t / (cap/t)) = cap tanh(s / cap) / t
        changed = call.but(
            scale=call.scale / self.t,
            softcap=None if call.softcap is None else call.softcap / self.t,
            sinks=None if call.sinks is None else call.sinks / self.t,
        )
        if call.bias is None:
            return changed
        if isinstance(call.bias, Tensor):
            return changed.but(bias=call.bias / self.t)
        return changed.but(bias=_Divided(call.bias, self.t))


@dataclass(frozen=True, eq=False)
class _Divided:
    of: Bias
    t: float

    def tile(self, i: Tensor, j: Tensor) -> Tensor:
        return self.of.tile(i, j) / self.t


@dataclass(frozen=True, eq=False)
class LogLength(Change):
    """Queries grow with the logarithm of how far they look: the query of token p (from 0) is
    multiplied by max(1, ln(p + 1) / ln `trained`), so that maps do not flatten beyond the `trained`
    tokens that a model knows (Chiang & Cholak 2022, arXiv 2202.12172; for long texts Su 2021).
    Raises ValueError unless trained > 1."""

    trained: int

    def __post_init__(self) -> None:
        if not self.trained > 1:
            raise ValueError(f"LogLength({self.trained}): give a length of 2 tokens or more")

    def check(self, attention: AttentionView, heads: tuple[int, ...]) -> None:
        _needs_distances(self, attention)

    def before(self, call: Call) -> Call:
        tokens = call.places.queries(call.n_q, call.query.device).clamp_min(0)
        factor = (tokens + 1).double().log() / math.log(self.trained)
        factor = factor.clamp_min(1)[:, None, :, None].to(call.query.dtype)
        return call.but(query=call.query * factor)


@dataclass(frozen=True, eq=False)
class ScaleSink(Change):
    """The first `n` real tokens count `factor` times as much against the others: ln(factor) is
    added to their scores. A weight m on them becomes factor m / (1 - m + factor m), the other
    weights share the rest in the proportions that they had (after StreamingLLM's finding, Xiao et
    al. 2023, arXiv 2309.17453, that these tokens hold weight that has nowhere to go).

    Raises ValueError unless factor > 0 and n > 0; to hide them give the pattern ~Sinks(n).
    """

    factor: float
    n: int = 1

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.n > 0):
            raise ValueError(
                f"{self!r}: give a factor above 0 (to hide tokens, the pattern ~Sinks(n)) and n "
                "of 1 or more"
            )

    def before(self, call: Call) -> Call:
        tokens = call.places.keys(call.n_k, call.query.device)
        return scaled(call, (tokens >= 0) & (tokens < self.n), self.factor)


@dataclass(frozen=True, eq=False)
class AddBias(Change):
    """`bias` is added to the scores, after a soft-cap: an object with `tile(i, j)` for token
    numbers, such as `maps.Alibi`, giving `(heads of the layer or 1, len(i), len(j))`."""

    bias: Bias

    def check(self, attention: AttentionView, heads: tuple[int, ...]) -> None:
        _needs_distances(self, attention)
        one = torch.zeros(1, dtype=torch.long)
        count = self.bias.tile(one, one).shape[0]
        if count not in (1, attention.heads):
            raise ValueError(
                f"{self.bias!r} is for {count} heads, {attention.name} has {attention.heads}; "
                "give one value for every head of the layer, or one for all"
            )

    def before(self, call: Call) -> Call:
        return call.biased(self.bias)

    def __repr__(self) -> str:
        return repr(self.bias)


@dataclass(frozen=True, eq=False)
class Silence(Change):
    """The heads' outputs are zero, as if their part of the output projection were."""

    discards = True

    def after(self, call: Call, out: Tensor) -> Tensor:
        return torch.zeros_like(out)


@dataclass(frozen=True, eq=False)
class Uniform(Change):
    """The heads weigh everything that they may see alike: no products, bias or learned sinks."""

    def before(self, call: Call) -> Call:
        return call.but(query=torch.zeros_like(call.query), bias=None, sinks=None)


@dataclass(frozen=True, eq=False)
class Scale(Change):
    """The heads' outputs are multiplied by `factor`."""

    factor: float

    def after(self, call: Call, out: Tensor) -> Tensor:
        return out * self.factor
