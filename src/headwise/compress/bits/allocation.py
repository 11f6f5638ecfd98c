"""`allocate`: one option for each item, at the least loss that a budget allows, exactly.

    minimise   sum over items of losses[i, choice_i]
    such that  sum over items of costs[i, choice_i] <= budget

An integer program with one binary variable an option (multiple-choice knapsack), solved to
optimality by HiGHS through scipy. It assumes that losses add up, which measured losses of small
changes do approximately: measure what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["allocate", "cheapest"]

Table = np.ndarray | Sequence[Sequence[float]]


def allocate(costs: Table, losses: Table, budget: float) -> tuple[int, ...]:
    """For each item the number of the option to take.

        bits = (8, 4, 2)
        chosen = allocate(costs, losses, budget=0.6 * costs[:, 0].sum())
        widths = {name: bits[c] for name, c in zip(names, chosen)}

    costs, losses `(items, options)`: any numbers; a NaN or infinite loss rules an option out.
    budget: of the sum of costs.

    Raises ValueError for tables that do not fit, and for a budget below what is reachable (which
    the error tells); ImportError without scipy (extra: bits).
    """
    price, loss = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if price.ndim != 2 or price.shape != loss.shape or not price.size:
        raise ValueError(
            f"costs {price.shape} and losses {loss.shape}: expected two tables (items, options) of "
            "one shape"
        )
    if not np.isfinite(price).all():
        raise ValueError("costs have entries that are not finite")
    allowed = np.isfinite(loss)
    if not allowed.any(1).all():
        raise ValueError(f"item {int((~allowed.any(1)).argmax())} has no option with a finite loss")
    least = cheapest(price, loss)
    spread = max(1.0, float(np.abs(price).max()))
    if budget < least - 1e-9 * spread * len(price):
        raise ValueError(
            f"budget={budget:g} cannot be kept; the least that is reachable: {least:g}"
        )
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ImportError(
            "allocate solves its integer program with scipy: pip install 'headwise[bits]'"
        ) from None
    items, options = price.shape
    # numbers of about 1 suit the solver's tolerances; no optimum moves
    scale = max(float(np.abs(np.where(allowed, loss, 0)).max()), 1e-300)
    target = np.where(allowed, loss, 0.0) / scale
    one_each = np.kron(np.eye(items), np.ones(options))
    found = milp(
        target.ravel(),
        integrality=np.ones(items * options),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(price.ravel()[None] / spread, ub=max(budget, least) / spread),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"no allocation was found: {found.message}")
    chosen = found.x.reshape(items, options).argmax(1)
    return tuple(int(c) for c in chosen)


def cheapest(costs: Table, losses: Table) -> float:
    """The least sum of costs that any allocation has."""
    price, loss = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    return float(np.where(np.isfinite(loss), price, np.inf).min(1).sum())
