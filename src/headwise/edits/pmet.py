"""PMET: facts spread over the feed-forward matrices of several layers, the attention left alone.

Targets are searched with the attention's output free to move as well, so that what the
feed-forward layer has to say is no more than its own share. For layers l up to the last one L,

    Delta_l = R_l K_l^T (weight C_l + K_l K_l^T)^-1,   R_l = (V* - V) / sqrt(L - l + 1)

where V is what layer L puts out with the layers below already changed, and K_l are the keys of
all facts, one a column. MEMIT, which this follows, divides by L - l + 1.

Source: Li et al. 2023, "PMET: Precise Model Editing in a Transformer", arXiv 2308.08742, section 4
(L - l + 1 counts the layers of the list from l on, as in the authors' code).
"""

from __future__ import annotations

import torch
from torch import Tensor


def ridge_update(
    missing: Tensor, keys: Tensor, moment: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """(out `(width, facts)`, into `(facts, hidden)`), whose product is added to W.

    missing: R `(width, facts)`. keys: K `(hidden, facts)`. moment: C `(hidden, hidden)`. weight:
    how much the usual keys count against the new ones. With weight 0 the product is R K^+, which
    answers every key exactly if keys are independent and are not too many. Computed in float64.
    Raises ValueError for a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight={weight}: expected 0 or more")
    k = keys.double()
    if weight == 0:
        return missing.double(), torch.linalg.pinv(k)
    whole = weight * moment.to(k.device).double() + k @ k.T
    tiny = 1e-12 * whole.diagonal().mean()
    eye = torch.eye(len(whole), dtype=whole.dtype, device=k.device)
    into = torch.linalg.solve(whole + tiny * eye, k).T
    return missing.double(), into


def shares(layers: int, root: bool = True) -> list[float]:
    """By what the missing values are divided in each of so many layers, from the first on: square
    roots of the layers that are left (PMET), or their number (MEMIT)."""
    left = range(layers, 0, -1)
    return [float(n) ** (0.5 if root else 1.0) for n in left]
