"""Entries are kept without which the output would be another."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.compress.cache.policy import Policy, Seen

_HELD = 2**20  # weights that are held at once
_ALONE = 1e-7  # the weight of all others below which an entry is all that a query sees


class ReconstructionError(Policy):
    """score_j = sum_i,h ||o_hi - o_hi without j||^2, i the newest `window` queries: exactly what
    leaving out one entry costs.

    Without entry j the other weights grow by 1 / (1 - a_ij), so that the output moves by
    a_ij / (1 - a_ij) (o_i - v_j); the norm follows from ||o||^2 - 2 o.v + ||v||^2, no vector is
    formed for a pair. So it sees what weight alone does not tell: an entry of much weight whose
    value is what the others say anyhow can go, a value of its own stays at little weight.

    Several entries leave at once, as if their errors added up (greedy, in one step). Source: the
    change of the output that Feng et al. bound in "Ada-KV", arXiv 2407.11550, section 3.1, and
    in "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective", arXiv
    2502.03805 (by weight times the projected value's norm); here it is computed.
    """

    def __init__(self, window: int = 64) -> None:
        if window < 1:
            raise ValueError(f"ReconstructionError needs window >= 1, not {window}")
        self.needs_queries = window

    def score(self, seen: Seen) -> Tensor:
        """`(R, n)` float32."""
        rows, group, queries, _ = seen.queries.shape
        if queries == 0:
            raise ValueError("ReconstructionError scores by the newest queries, and was given none")
        # odds are large where one entry has nearly all weight: float64, and rows that sum to one
        values = seen.values.double()
        squared = values.square().sum(-1)[:, None, None]  # (R, 1, 1, n)
        total = torch.zeros_like(seen.positions, dtype=torch.float64)
        here, real = seen.map(), (seen.query_positions >= 0)[:, None, :, None]
        step = max(1, _HELD // (rows * group * total.shape[-1]))
        for some in torch.arange(queries, device=values.device).split(step):
            weight = here.rows(some).double() * real[:, :, some]  # (R, g, some, n)
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
            out = torch.einsum("rgmn,rnd->rgmd", weight, values)
            length = out.square().sum(-1, keepdim=True)
            apart = length - 2 * torch.einsum("rgmd,rnd->rgmn", out, values) + squared
            rest = 1 - weight
            error = (weight / rest.clamp_min(_ALONE)).square() * apart.clamp_min(0.0)
            # without an entry that is all there is nothing is left
            total += torch.where(rest < _ALONE, length, error).sum((1, 2))
        return total.float()
