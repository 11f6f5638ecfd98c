"""What taking out a head would do, estimated from gradients at the heads' outputs.

gradient     (r - z) . dm/dz: one forward and one backward pass for all heads
             (Michel et al. 2019, arXiv 1905.10650, equation 2, with its sign; attribution
             patching, Nanda 2023; Syed et al. 2023, arXiv 2310.10348)
integrated   the same with the gradient's mean on the way from z to r, all heads of an attention
             moving together: the heads' shares of what their whole attention does, which they
             sum up to (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365, at
             the heads instead of the input; cf. Hao et al. 2021, arXiv 2004.11207)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from headwise.instruments.ablated_parts import heads_site
from headwise.instruments.clean_run import CleanRun
from headwise.instruments.examples import Examples
from headwise.instruments.metrics import Metric
from headwise.instruments.part_effects import Measurement
from headwise.models import Site
from headwise.models.sites import Write

__all__ = ["ESTIMATES", "check_estimate", "estimated"]

ESTIMATES = ("gradient", "integrated")


def check_estimate(estimate: str, metric: Metric) -> None:
    """Raises ValueError for an estimate that is not known, or that this metric cannot have."""
    if estimate not in ESTIMATES:
        raise ValueError(f"estimate={estimate!r}: expected {' or '.join(map(repr, ESTIMATES))}")
    if metric.name == "accuracy":
        raise ValueError("accuracy has no gradient: estimate by 'loss' or a logit difference")
    if estimate == "gradient" and metric.needs_clean:
        raise ValueError(
            f"the gradient of {metric.name} is zero at the unchanged model, and so would be every "
            "estimate: use estimate='integrated', or another metric"
        )


def estimated(
    measurement: Measurement,
    batch: Examples,
    clean: CleanRun,
    estimate: str,
    steps: int = 8,
    step: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """`(heads, examples)` for all heads of the model in order, where `clean.values` holds every
    site of heads. `steps`: points on the way, for "integrated"."""
    view = measurement.view
    sites = [heads_site(view, a) for a in view.attentions]
    values = {site: clean.values[site] for site in sites}
    draws = measurement.replacement.draws
    total: Tensor | None = None
    for draw in range(draws):
        instead = measurement.replacement.of(batch, values, draw)
        gaps = {site: (instead[site] - values[site]) for site in sites}
        if estimate == "gradient":
            slopes = _slopes(measurement, batch, clean, sites, gaps, [0.0])
            step()
        else:
            shares = [(k + 0.5) / steps for k in range(steps)]
            slopes = {}
            for site in sites:
                slopes |= _slopes(measurement, batch, clean, [site], gaps, shares)
                step()
        found = [(gaps[s].double() * slopes[s].double()).sum((1, 3)).T for s in sites]
        whole = torch.cat(found) / draws
        total = whole if total is None else total + whole
    assert total is not None
    return np.asarray(total.cpu().numpy())


def _slopes(
    measurement: Measurement,
    batch: Examples,
    clean: CleanRun,
    sites: list[Site],
    gaps: Mapping[Site, Tensor],
    shares: list[float],
) -> dict[Site, Tensor]:
    """dm/dz `(examples, n, heads, value_dim)`, its mean where z stands at z + share * gap, for each
    share in turn, at all these sites at once."""
    copies = len(shares)
    leaves: dict[Site, Tensor] = {}
    part = torch.tensor(shares).repeat_interleave(clean.batch)

    def move(site: Site) -> Write:
        def write(there: Tensor) -> Tensor:
            away = part.to(there).view(-1, 1, 1, 1) * gaps[site].repeat(copies, 1, 1, 1)
            # a leaf of its own, so that frozen parameters give a gradient all the same
            leaf = torch.zeros_like(there, requires_grad=True)
            leaves[site] = leaf
            return there + away.to(there.dtype) + leaf

        return write

    writes = {**measurement.frozen(clean), **{site: move(site) for site in sites}}
    with torch.enable_grad():
        logits = clean.run(writes, copies, clean.start_of(sites))
        score = measurement.scores(batch, logits, clean.output.detach())
        if not score.requires_grad:
            raise ValueError(
                f"the metric {measurement.metric.name} does not depend on the heads by a "
                "gradient (argmax, detach, no_grad?); use a metric that has one"
            )
        found = torch.autograd.grad(score.sum(), [leaves[site] for site in sites])
    return {
        site: slope.unflatten(0, (copies, clean.batch)).mean(0)
        for site, slope in zip(sites, found, strict=True)
    }
