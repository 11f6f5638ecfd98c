"""Generic relevance for self-attention and encoder-decoders, without n x n matrices.

Chefer, Gur and Wolf 2021 (arXiv 2103.15679): A_bar = mean_h (dy/dA_h * A_h)^+ is added up through
the layers (equations 5 to 11): R <- R + A_bar R for self-attention, and for cross-attention of a
decoder (d) into an encoder (e), R^de <- R^de + (N^dd)^T A_bar N^ee, where N is R with what lies
beside the identity divided by its row sums.

dy/dA_h = dy/dO_h V_h^T, so A_bar is made in tiles of rows from queries, keys, values and one
gradient at the heads' outputs. The row of R that the answer is read from then takes products of
vectors and A_bar only:

    self         r <- r + r A_bar, from the top layer down
    cross        the row of (N^dd)^T A_bar N^ee is ((N^dd r)^T A_bar) N^ee: columns N^dd r go up
                 through the decoder, all layers' together with the row sums; rows go down through
                 the encoder, divided by row sums that went up

Two streams that attend to each other (LXMERT) feed into each other's R both transposed and not;
there the algebra needs whole matrices: bimodal.py holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.instruments.kept_maps import (
    Kept,
    check_stacks,
    keeping,
    read_from,
    read_site,
    stack_read,
    wanted_stack,
)
from headwise.instruments.metrics import Metric
from headwise.models import ModelView, UnsupportedModelError
from headwise.models.prefix import logits_of
from headwise.models.sites import Site, Write, touching

__all__ = ["Relevant", "generic", "relevant_maps"]

TILE = 2**22
"""Numbers of a map, heads together, that are made at a time."""


@dataclass(frozen=True, eq=False)
class Relevant:
    """A_bar of one attention, never made as a whole. gradient `(batch, heads, n_q, value_dim)`:
    of the target at the heads' outputs."""

    kept: Kept
    gradient: Tensor

    def tile(self, rows: Tensor) -> Tensor:
        """Some rows of A_bar `(batch, len(rows), n_k)`, >= 0."""
        weights = self.kept.map.rows(rows)
        groups = self.kept.value.shape[1]
        asked = self.gradient[:, :, rows].unflatten(1, (groups, -1)).float()
        slope = torch.einsum("bghqd,bgkd->bghqk", asked, self.kept.value.float()).flatten(1, 2)
        return (slope * weights).clamp_min_(0).mean(1)

    def down(self, rows: Tensor) -> Tensor:
        """x A_bar `(batch, m, n_k)` for x `(batch, m, n_q)`."""
        made = rows.new_zeros(*rows.shape[:2], self.kept.map.scores.n_k)
        for some in self._tiles():
            made += rows[:, :, some] @ self.tile(some)
        return made

    def up(self, columns: Tensor) -> Tensor:
        """A_bar x `(batch, n_q, m)` for x `(batch, n_k, m)`."""
        return torch.cat([self.tile(some) @ columns for some in self._tiles()], 1)

    def _tiles(self) -> tuple[Tensor, ...]:
        s = self.kept.map.scores
        size = max(1, TILE // (s.batch * s.heads * s.n_k))
        return torch.arange(s.n_q, device=s.device).split(size)


def generic(
    view: ModelView,
    inputs: dict[str, Any],
    metric: Metric,
    *,
    of: str | None = None,
    identity: bool = True,
    at: Tensor | int | None = None,
) -> Tensor:
    """Relevance `(batch, n)` of the inputs of one stack for what the metric scores.

    The row of R^ss, or R^de of the encoder's inputs, that the answer is read from; where it is
    read from several positions, their mean by the norms of the gradient there. of: the stack
    whose inputs are scored (by default the first, the encoder). identity: whether the 1 that R
    starts with at the position itself stays, as in the paper. at: a position to read instead.

    One pass with its gradient, and 1 to 3 passes over the tiles of every map: O(layers n d) and
    2**22 numbers beside. Raises UnsupportedModelError where the heads' outputs are not what the
    output projection is handed (gates, norms), or several stacks are not an encoder and decoder.
    """
    stack = wanted_stack(view, of)
    maps, row = relevant_maps(view, inputs, metric, at)
    read = stack_read(view)
    mine = [one for one in maps if one.kept.attention.stack == read]
    selves = [one for one in mine if one.kept.attention.kind == "self"]
    if stack == read:
        found = _down(selves, row[:, None])[:, 0]
        return found if identity else found - row
    theirs = [one for one in maps if one.kept.attention.stack == stack]
    return _crossed(mine, theirs, row)


def relevant_maps(
    view: ModelView, inputs: dict[str, Any], metric: Metric, at: Tensor | int | None = None
) -> tuple[list[Relevant], Tensor]:
    """A_bar of every attention, in order of execution, and the weights `(batch, n)` of the
    positions that the answer is read from."""
    check_stacks(view)
    batch = next(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim())
    sites = {a: Site("heads", a.layer, a.stack, a.kind) for a in view.attentions}
    last = read_site(view)
    seen: dict[Site, Tensor] = {}

    def hold(site: Site) -> Write:
        def write(there: Tensor) -> Tensor:
            # a frozen model's graph begins at the first heads
            seen[site] = there if there.requires_grad else there.detach().requires_grad_()
            return seen[site]

        return write

    held = {site: hold(site) for site in (*sites.values(), last)}
    with torch.enable_grad(), keeping(view, batch) as kept, touching(view, held):
        score = metric.score(logits_of(view.model(**inputs)), inputs).sum()
        wanted = [seen[sites[one.attention]] for one in kept]
        if not score.requires_grad:
            raise ValueError("the target has no gradient in what the heads give")
        found = torch.autograd.grad(score, [*wanted, seen[last]], allow_unused=True)
    for one, there in zip(kept, wanted, strict=True):
        mine = one.out.transpose(1, 2).to(there.dtype)
        if not torch.allclose(mine, there.detach(), rtol=1e-3, atol=1e-4):
            raise UnsupportedModelError(
                f"{one.attention.name} changes its heads' outputs before the output projection; "
                "the gradient of its map is not known from there"
            )
    slopes = [
        torch.zeros_like(there) if slope is None else slope
        for there, slope in zip([*wanted, seen[last]], found, strict=True)
    ]
    relevant = [
        Relevant(one, slope.detach().transpose(1, 2))
        for one, slope in zip(kept, slopes, strict=False)
    ]
    return relevant, read_from(slopes[-1], at)


def _down(maps: Sequence[Relevant], rows: Tensor) -> Tensor:
    """x (I + A_bar_L) ... (I + A_bar_1)."""
    for one in reversed(maps):
        rows = rows + one.down(rows)
    return rows


def _crossed(mine: Sequence[Relevant], theirs: Sequence[Relevant], row: Tensor) -> Tensor:
    """The row of R^de `(batch, n_encoder)`."""
    columns, crossings = [], []
    here = row[:, None]
    for one in reversed(mine):  # a decoder layer attends to itself, then to the encoder
        if one.kept.attention.kind == "cross":
            columns.append(here[:, 0])
            crossings.append(one)
        else:
            here = here + one.down(here)
    columns.reverse()
    crossings.reverse()
    risen = _normalized(mine, columns)
    rows = sum(one.down(up[:, None]) for one, up in zip(crossings, risen, strict=True))
    if not isinstance(rows, Tensor):
        raise ValueError("the decoder has no cross-attention")
    ones = torch.ones_like(rows)
    sums = ones.transpose(1, 2)
    for one in theirs:
        sums = sums + one.up(sums)
    shared = rows / _safe(sums.transpose(1, 2) - 1)
    return (rows + _down(theirs, shared) - shared)[:, 0]


def _normalized(mine: Sequence[Relevant], columns: Sequence[Tensor]) -> list[Tensor]:
    """N^dd x_c `(batch, n)` for the c-th cross-attention and its column, N^dd as it is there."""
    whole = torch.stack([torch.ones_like(columns[0]), *columns], -1)
    start = whole
    found: list[Tensor] = []
    for one in mine:
        if one.kept.attention.kind == "self":
            whole = whole + one.up(whole)
            continue
        number = len(found) + 1
        beside = whole[..., number] - start[..., number]
        found.append(start[..., number] + beside / _safe(whole[..., 0] - 1))
    return found


def _safe(sums: Tensor) -> Tensor:
    """Row sums to divide by; rows of zeros stay zeros."""
    return torch.where(sums.abs() < 1e-12, torch.inf, sums)
