"""How far a layer is one linear map of what it reads, over all positions and for each.

X and Y `(rows, width)` are what stands in the residual before and after a layer, centred, each
divided by its Frobenius norm: linearity is 1 - min over A of ||X A - Y||^2 (Razzhigaev et al. 2024,
"Your transformer is secretly linear", arXiv 2405.12250, section 3), and a row's distance from that
best map is the position's non-linearity (LLM-Microscope, arXiv 2502.15007).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.examples import model_view
from headwise.instruments.run import evaluating
from headwise.models import ModelView
from headwise.models.sites import recording, sites_of

__all__ = ["Linearity", "linearity", "linearity_by_layer"]


@dataclass(frozen=True, eq=False)
class Linearity:
    """`score` in [0, 1], 1 where one map does it all. `rows`: each row's distance from that map, in
    units in which all of Y has length 1; their squares sum to 1 - score."""

    score: float
    rows: Tensor


def linearity(x: Tensor, y: Tensor, centred: bool = True) -> Linearity:
    """Linearity of rows x `(rows, d)` to rows y `(rows, e)`, in float64.

    Raises ValueError for shapes that do not fit and for no more rows than d + 1: a map could then
    be found for anything. Rows that are all the same have nothing to explain: 1.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)}: expected (rows, d) and (rows, e)"
        )
    if len(x) <= x.shape[1] + 1:
        raise ValueError(
            f"{len(x)} rows of {x.shape[1]} numbers: any y is a linear map of so few; give more "
            f"than {x.shape[1] + 1}"
        )
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    size = y.norm()
    if size == 0:
        return Linearity(1.0, torch.zeros(len(y), dtype=torch.float64))
    y = y / size
    left, values, _ = torch.linalg.svd(x, full_matrices=False)
    left = left[:, values > values.amax() * 1e-10]  # the space of all X A
    rows = (y - left @ (left.T @ y)).norm(dim=1)
    return Linearity(float(1 - rows.pow(2).sum()), rows)


def linearity_by_layer(
    model: nn.Module | ModelView, inputs: Mapping[str, Any], stack: str | None = None
) -> list[Linearity]:
    """Linearity of every layer of a stack (the last by default), over all positions of a batch.

    `rows` are `(batch * n,)`, example after example; padding counts as any other position. Raises
    ValueError for fewer positions than features.
    """
    view = model_view(model)
    wanted = stack or view.stacks[-1]
    sites = [s for s in sites_of(view, "residual") if s.stack in (None, wanted)]
    with torch.no_grad(), evaluating(view.model), recording(view, sites) as seen:
        view.model(**inputs)
    states = [seen[site].flatten(0, -2) for site in sites]
    return [linearity(a, b) for a, b in pairwise(states)]
