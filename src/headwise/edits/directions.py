"""Directions of heads' outputs, from two sets of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.discovery import view as view_of
from headwise.models.sites import Site, recording, sites_of
from headwise.models.structure import ModelView

Batches = Iterable[Mapping[str, Any]]


@torch.no_grad()
def head_directions(
    model: nn.Module | ModelView,
    positive: Batches,
    negative: Batches,
    position: int | None = -1,
    unit: bool = True,
) -> dict[Site, Tensor]:
    """For each attention, by its "heads" site, what its heads give on positive examples more than
    on negative ones, `(heads, value_dim)`: the difference of the two means, to be added by
    `AddDirection` (mass-mean shift of Li et al. 2023, arXiv 2306.03341, section 4).

        found = head_directions(model, [kind], [unkind])
        with headwise.swap(model, {3: AddDirection(found[Site("heads", 3)], strength=4.0)}): ...

    positive, negative: batches of model inputs without padding at the position that is read.
    position: which token's output, None for the mean over all. unit: each head's direction in
    units of its standard deviation along it, over all examples, so that strengths of heads
    compare; a head that gives the same everywhere gets zeros.

    Raises ValueError for a side without examples.
    """
    look = model if isinstance(model, ModelView) else view_of(model)
    wanted = sites_of(look, "heads")
    sides = {name: _outputs(look, wanted, batches, position, name) for name, batches in
             (("positive", positive), ("negative", negative))}  # fmt: skip
    found = {}
    for site in wanted:
        more, less = sides["positive"][site], sides["negative"][site]
        shift = more.mean(0) - less.mean(0)
        if unit:
            length = shift.norm(dim=-1, keepdim=True)
            along = shift / length.clamp_min(1e-12)
            spread = torch.cat([(x * along).sum(-1) for x in (more, less)]).std(0, correction=0)
            shift = along * spread[:, None]
        found[site] = shift
    return found


def _outputs(
    look: ModelView, wanted: list[Site], batches: Batches, position: int | None, name: str
) -> dict[Site, Tensor]:
    """`(examples, heads, value_dim)` of each site."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    for batch in batches:
        with recording(look, wanted) as kept:
            look.model(**batch)
        for site, value in kept.items():
            parts[site].append(value.mean(1) if position is None else value[:, position])
    if not any(parts.values()):
        raise ValueError(f"there are no {name} examples: give at least one batch of model inputs")
    return {site: torch.cat(some).float() for site, some in parts.items()}
