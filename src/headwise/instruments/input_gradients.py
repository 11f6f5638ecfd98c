"""Attribution by gradients with respect to the input embeddings.

    gradient_x_input      x * dF/dx: first order, exact where F is homogeneous of degree one
    integrated_gradients  (x - b) * mean of dF/dx on the straight way from a baseline b to x

The second sums to F(x) - F(b) (Sundararajan, Taly & Yan 2017, arXiv 1703.01365, proposition 1); how
far a sum of few steps is from that is its completeness gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.instruments.input_places import InputPlace, clean_logits, scored
from headwise.instruments.metrics import Metric
from headwise.models import ModelView

__all__ = ["Integrated", "gradient_x_input", "integrate", "integrated_gradients", "over_features"]

FEATURES = ("sum", "norm")


def over_features(parts: Tensor, features: str) -> Tensor:
    """`(batch, n, width)` to `(batch, n)`: "sum", which keeps signs and adds up to the whole, or
    "norm", the euclidean length. Raises ValueError for another word."""
    if features == "sum":
        return parts.sum(-1)
    if features == "norm":
        return torch.linalg.vector_norm(parts, dim=-1)
    raise ValueError(f"features={features!r}: expected one of {', '.join(FEATURES)}")


def gradient_x_input(
    view: ModelView,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    at: str | None = None,
    of: str | None = None,
    features: str = "sum",
) -> Tensor:
    """`(batch, n)` float: each position's input times the gradient of the metric there.

    `at`, `of`: where the inputs are read, see `input_places`. Raises ValueError for a metric
    without a gradient, and what `InputPlace` raises.
    """
    _known(features)
    place = InputPlace(view, inputs, at, of)
    x = place.read().requires_grad_(True)
    score = scored(place, metric, x, clean_logits(place, metric))
    (gradient,) = torch.autograd.grad(score.sum(), x)
    return over_features((x * gradient).detach(), features)


@dataclass(frozen=True, eq=False)
class Integrated:
    """Integrated gradients with what they should add up to.

    `parts` `(batch, n, width)`; `score`, `baseline_score` `(batch,)`: the metric on the inputs and
    on the baseline; `gap` `(batch,)`: by how much the parts miss their difference.
    """

    parts: Tensor
    score: Tensor
    baseline_score: Tensor

    @property
    def gap(self) -> Tensor:
        return self.parts.sum((1, 2)) - (self.score - self.baseline_score)


def integrate(
    view: ModelView,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    steps: int = 32,
    baseline: str | int | Tensor = "zero",
    at: str | None = None,
    of: str | None = None,
    rule: str = "gauss",
    at_once: int = 8,
) -> Integrated:
    """Integrated gradients by feature, and their completeness gap.

    `steps`: points on the way. `baseline`: "zero"; "pad", what stands there if every token is the
    model's padding token; a token id, the same with that token; or a tensor that broadcasts to
    `(batch, n, width)`. `rule`: "gauss" (Gauss-Legendre points, exact for polynomials of degree
    2 * steps - 1) or "middle" (the middles of equal steps). `at_once`: points in a forward pass.

    Raises ValueError for other words, for a baseline that does not fit, and for a metric without a
    gradient.
    """
    if steps < 1 or at_once < 1:
        raise ValueError(f"steps={steps}, at_once={at_once}: expected 1 or more")
    places, weights = _way(rule, steps)
    place = InputPlace(view, inputs, at, of)
    x = place.read()
    start = _baseline(place, baseline, x)
    clean = clean_logits(place, metric)
    with torch.no_grad():
        ends = scored(place, metric, torch.cat([x, start]), clean)
    total = torch.zeros_like(x)
    for first in range(0, steps, at_once):
        some = places[first : first + at_once]
        points = torch.cat([start + a * (x - start) for a in some]).requires_grad_(True)
        score = scored(place, metric, points, clean)
        (gradients,) = torch.autograd.grad(score.sum(), points)
        for weight, gradient in zip(
            weights[first : first + at_once], gradients.chunk(len(some)), strict=True
        ):
            total += weight * gradient
    found, at_baseline = ends.detach().chunk(2)
    return Integrated((x - start) * total, found, at_baseline)


def integrated_gradients(
    view: ModelView,
    inputs: Mapping[str, Any],
    metric: Metric,
    *,
    features: str = "sum",
    steps: int = 32,
    baseline: str | int | Tensor = "zero",
    at: str | None = None,
    of: str | None = None,
    rule: str = "gauss",
    at_once: int = 8,
) -> Tensor:
    """`(batch, n)`: `integrate` summed over features, or the length over them.

    With "sum" a row adds up to metric(inputs) - metric(baseline), but for `integrate(...).gap`.
    Options are those of `integrate`; raises what it raises.
    """
    _known(features)
    found = integrate(
        view,
        inputs,
        metric,
        steps=steps,
        baseline=baseline,
        at=at,
        of=of,
        rule=rule,
        at_once=at_once,
    )
    return over_features(found.parts, features)


def _known(features: str) -> None:
    over_features(torch.zeros(1, 1, 1), features)


def _way(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Points in (0, 1) and their weights, which add up to 1."""
    if rule == "gauss":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return list((points + 1) / 2), list(weights / 2)
    if rule == "middle":
        return [(step + 0.5) / steps for step in range(steps)], [1 / steps] * steps
    raise ValueError(f"rule={rule!r}: expected 'gauss' or 'middle'")


def _baseline(place: InputPlace, given: str | int | Tensor, x: Tensor) -> Tensor:
    if isinstance(given, Tensor):
        try:
            return given.to(x).expand_as(x)
        except RuntimeError:
            raise ValueError(
                f"a baseline {tuple(given.shape)} does not broadcast to {tuple(x.shape)}"
            ) from None
    if given == "zero":
        return torch.zeros_like(x)
    if given == "pad":
        config = getattr(place.view.model, "config", None)
        token = getattr(config, "pad_token_id", None)
        if token is None:
            raise ValueError(
                f"{type(place.view.model).__name__} names no padding token: give a token id, "
                "'zero' or a tensor as baseline"
            )
        return place.read(int(token))
    if isinstance(given, int):
        return place.read(given)
    raise ValueError(f"baseline={given!r}: expected 'zero', 'pad', a token id or a tensor")
