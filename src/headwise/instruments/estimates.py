"""What a patch would do, to first order, from gradients instead of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.instruments.exchange import Scored
from headwise.models.prefix import logits_of
from headwise.models.sites import Site, Write, touching

__all__ = ["estimated"]


def estimated(
    base: Scored,
    own: Mapping[Site, Tensor],
    source: Mapping[Site, Tensor],
    steps: int | None = None,
) -> dict[Site, Tensor]:
    """(source - own) . gradient of the metric with respect to a site, summed over features:
    `(batch, n)` for a site of one vector a position, `(batch, n, heads)` for one of heads.

    steps: None for the gradient in the run of `base`; else its mean over so many inputs between
    that run and the other, mixed at `residual` of every stack's first layer, which both `own` and
    `source` then hold.
    """
    found: dict[Site, Tensor] = {}
    shares = [0.0] if steps is None else [(k + 0.5) / steps for k in range(steps)]
    first = [Site("residual", s.layer, s.stack) for s in own if s.layer == 0]
    mixed = {s: source[s] - own[s] for s in dict.fromkeys(first) if s in own and s in source}
    asked = list(own)
    for share in shares:
        there = {site: own[site] + share * gap for site, gap in mixed.items()} if share else {}
        for site, gradient in _gradients(base, asked, there).items():
            product = (source[site] - own[site]) * gradient / len(shares)
            summed = product.double().sum(-1)
            found[site] = found[site] + summed if site in found else summed
    return found


def _gradients(
    base: Scored, sites: Sequence[Site], there: Mapping[Site, Tensor]
) -> dict[Site, Tensor]:
    """Gradients of each example's metric, from one forward and one backward pass."""
    leaves: dict[Site, Tensor] = {}

    def adding(site: Site) -> Write:
        def write(value: Tensor) -> Tensor:
            value = there[site].to(value) if site in there else value
            leaves[site] = torch.zeros_like(value, requires_grad=True)
            return value + leaves[site]

        return write

    inputs: dict[str, Any] = dict(base.inputs)
    with torch.enable_grad(), touching(base.view, {site: adding(site) for site in sites}):
        total = base.of(logits_of(base.view.model(**inputs))).sum()
        if not total.requires_grad:
            raise ValueError(
                f"the metric {base.metric.name} has no gradient, so effects cannot be estimated "
                "from it: choose method='exact', or a metric of logits"
            )
        given = torch.autograd.grad(total, [leaves[site] for site in sites], allow_unused=True)
    return {
        site: torch.zeros_like(leaves[site]) if one is None else one
        for site, one in zip(sites, given, strict=True)
    }
