"""Changes that move attention between sets of tokens, a head at a time, without an n x n matrix.

Weights are multiplied by adding logarithms to scores. Where the factor differs from row to row it
is a product of something of the query and something of the key, which one more coordinate of both
carries: a changed map costs what the unchanged one does, and is seen by who observes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.edits.change import Call, Change
from headwise.edits.product import scaled, with_product
from headwise.edits.token_sets import among_keys, among_queries, check_tokens
from headwise.maps import AttentionMap, attend

NOTHING = -30.0
"""Stands for the logarithm of 0: e^-30 is below the rounding of a float32."""


@dataclass(frozen=True, eq=False)
class ScaleTokens(Change):
    """Attention to `tokens` counts `factor` times as much against the rest: ln(factor) is added to
    their scores. A mass m on them becomes factor m / (1 - m + factor m); among themselves, and
    among the rest, proportions stay. (Emphasis of chosen tokens in chosen heads: PASTA, Zhang et
    al. 2023, arXiv 2311.02262, which scales down what is not chosen.)

    tokens: token numbers, or booleans `(n,)` or `(batch, n)`. Raises ValueError unless factor > 0
    (to hide tokens use a pattern), and for what is no set of tokens.
    """

    tokens: Any
    factor: float

    def __post_init__(self) -> None:
        check_tokens(self.tokens, "ScaleTokens")
        if not self.factor > 0:
            raise ValueError(
                f"ScaleTokens(factor={self.factor}): give more than 0; to hide tokens use a "
                "pattern such as ~Sinks(n) or a KeyMask"
            )

    def before(self, call: Call) -> Call:
        return scaled(call, among_keys(self.tokens, call), self.factor)


@dataclass(frozen=True, eq=False)
class MoveMass(Change):
    """In every row, `share` of the mass on `tokens` goes to other keys, in the proportions that
    these have: p'_s = (1 - share) p_s, p'_j = p_j (1 + share m_s / m_to). Rows sum to what they
    summed to. (VAR, Kang et al. 2025, arXiv 2503.03321, moves it from visual sinks to the other
    visual tokens.)

    tokens, to: sets of tokens as in `ScaleTokens`; `to` None: all keys that are not in `tokens`.
    queries: only the rows of these tokens are changed, None for all. Rows that see none of `to`
    stay. Raises ValueError unless 0 <= share <= 1.
    """

    tokens: Any
    share: float
    to: Any = None
    queries: Any = None

    def __post_init__(self) -> None:
        for name in ("tokens", "to", "queries"):
            if getattr(self, name) is not None or name == "tokens":
                check_tokens(getattr(self, name), f"MoveMass({name}=)")
        if not 0 <= self.share <= 1:
            raise ValueError(f"MoveMass(share={self.share}): give a share between 0 and 1")

    def before(self, call: Call) -> Call:
        if self.share == 0:
            return call
        source = among_keys(self.tokens, call)
        to = ~source if self.to is None else among_keys(self.to, call) & ~source
        rows = None if self.queries is None else among_queries(self.queries, call)[:, None]
        return moved_mass(call, source[:, None], to[:, None], self.share, rows)


@dataclass(frozen=True, eq=False)
class CalibrateSinks(Change):
    """Attention sinks other than the first tokens keep `keep` of their weight, the rest of it goes
    to the keys that are no sinks (ACT: Yu et al. 2024, arXiv 2406.15765, section 4.2).

    A key is a sink of a head where the mean weight that it receives, over all rows of the call, is
    more than `alpha` / n_k. `first`: so many first tokens are left alone, and receive nothing.
    While decoding, the one row of the call says what is a sink. Raises ValueError unless alpha > 0
    and 0 <= keep <= 1.
    """

    alpha: float = 5.0
    keep: float = 0.4
    first: int = 1

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and 0 <= self.keep <= 1 and self.first >= 0):
            raise ValueError(f"{self!r}: give alpha > 0, keep between 0 and 1, first >= 0")

    def before(self, call: Call) -> Call:
        if self.keep == 1:
            return call
        with torch.no_grad():
            seen = AttentionMap(
                call.query,
                call.key,
                pattern=call.pattern,
                scale=call.scale,
                bias=call.bias,
                sinks=call.sinks,
                softcap=call.softcap,
            )
            received = seen.received() / call.n_q
            numbers = call.places.keys(call.n_k, call.query.device)[:, None]
            real = numbers >= self.first
            sinks = (received > self.alpha / call.n_k) & real
        return moved_mass(call, sinks, real & ~sinks, 1 - self.keep, None)


def moved_mass(call: Call, source: Tensor, to: Tensor, share: float, rows: Tensor | None) -> Call:
    """The call with `share` of each row's mass on `source` moved to `to`.

    source, to: `(batch or 1, heads or 1, n_k)` booleans without a key in common; rows:
    `(batch or 1, 1, n_q)`, which rows are changed.
    """
    on_source, on_to = mass_on(call, source), mass_on(call, to)
    moves = (on_source > 0) & (on_to > 0)
    moves = moves if rows is None else moves & rows
    less = NOTHING if share == 1 else max(math.log1p(-share), NOTHING)
    gain = torch.log1p(share * on_source / on_to.clamp_min(1e-30))
    by_row = torch.stack([torch.full_like(gain, less), gain], -1) * moves[..., None]
    return with_product(call, by_row, torch.stack([source, to], -1))


def mass_on(call: Call, keys: Tensor) -> Tensor:
    """Mass of each row on `keys` `(batch or 1, heads or 1, n_k)` -> `(batch, heads, n_q)`."""
    batch, heads = call.query.shape[:2]
    kv_heads = call.key.shape[1]
    columns = keys.expand(batch, -1, -1).to(call.query.dtype)
    group = heads // kv_heads
    if columns.shape[1] == 1:
        return _weighed(call, columns[..., None].expand(-1, kv_heads, -1, -1))[..., 0]
    # a column for each query head of the group, of which each reads its own
    several = columns.unflatten(1, (kv_heads, group)).transpose(-1, -2)
    found = _weighed(call, several).unflatten(1, (kv_heads, group))
    return torch.stack([found[:, :, g, :, g] for g in range(group)], 2).flatten(1, 2)


def _weighed(call: Call, columns: Tensor) -> Tensor:
    """The call's map times columns `(batch, kv_heads, n_k, m)`; gradients pass."""
    return attend(
        call.query,
        call.key,
        columns,
        call.pattern,
        call.scale,
        call.bias,
        call.sinks,
        call.softcap,
        need_lse=False,
    )[0]
