"""Linear probes: a logistic regression for classes, a ridge regression for numbers.

Both are convex, so what they find is a matter of the data alone. Features are brought to mean 0
and deviation 1 by the rows that they are fitted on. The penalty is that of scikit-learn: logistic
minimises |W|^2 / 2 + strength * (sum of losses), ridge |y - XW|^2 + |W|^2 / strength; biases are
free. Work in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LinearProbe", "fit_logistic", "fit_ridge"]

_SLOPE = 1e-7


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """scores = ((x - mean) / deviation) weight^T + bias. weight `(outputs, d)`; one output for
    two classes (its sign decides) and for one number. classes: 0 where numbers are fitted."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor
    classes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x `(rows, d)` to scores `(rows, classes)`, or numbers `(rows, outputs)`."""
        found = self._scaled(x) @ self.weight.mT + self.bias
        if self.classes == 2:
            return torch.cat([torch.zeros_like(found), found], 1)
        return found

    def predict(self, x: Tensor) -> Tensor:
        """Classes `(rows,)`, or numbers `(rows, outputs)`."""
        found = self(x)
        return found.argmax(1) if self.classes else found

    def direction(self, label: int = 1) -> Tensor:
        """Where in the features themselves a class (or number) is `(d,)`, of length 1."""
        row = self.weight[0 if self.classes == 2 else label] / self.deviation
        sign = -1.0 if self.classes == 2 and label == 0 else 1.0
        return sign * row / row.norm().clamp_min(1e-30)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x.double() - self.mean) / self.deviation


def fit_logistic(x: Tensor, y: Tensor, classes: int, strength: float = 1.0) -> LinearProbe:
    """x `(rows, d)`, y `(rows,)` classes from 0. To a slope of 1e-7 of the mean loss.

    Raises ValueError for a strength that is not positive.
    """
    _positive(strength)
    scaled, mean, deviation = _standard(x)
    rows, width = scaled.shape
    # with fewer rows than features the answer lies in their span, where the work is less
    basis = torch.linalg.qr(scaled.mT).Q if rows < width else None
    inside = scaled if basis is None else scaled @ basis
    solve = _newton if classes == 2 else _quasi_newton
    weight, bias = solve(inside, y, classes, 1 / (strength * rows))
    return LinearProbe(
        weight if basis is None else weight @ basis.mT, bias, mean, deviation, classes
    )


def _newton(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Two classes: the mean loss plus penalty |w|^2 / 2, by damped Newton steps."""
    rows, width = x.shape
    full = torch.cat([x, x.new_ones(rows, 1)], 1)
    target = y.to(x)
    held = torch.full((width + 1,), penalty, dtype=x.dtype)
    held[-1] = 0
    w = torch.zeros(width + 1, dtype=x.dtype)

    def cost(w: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(full @ w, target)
        return loss + (held * w * w).sum() / 2

    now = cost(w)
    for _ in range(100):
        p = (full @ w).sigmoid()
        slope = full.mT @ (p - target) / rows + held * w
        if slope.abs().amax() < _SLOPE:
            break
        curve = (full.mT * (p * (1 - p))) @ full / rows + torch.diag(held + 1e-12)
        step = torch.linalg.solve(curve, slope)
        size = 1.0
        while size > 1e-6 and cost(w - size * step) > now:
            size /= 2
        w = w - size * step
        now = cost(w)
    return w[None, :-1], w[-1:]


def _quasi_newton(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Several classes, by L-BFGS."""
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        tolerance_grad=_SLOPE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def cost() -> Tensor:
        solver.zero_grad()
        total = F.cross_entropy(x @ weight.mT + bias, y) + penalty * weight.pow(2).sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(cost)
    return weight.detach(), bias.detach()


def fit_ridge(x: Tensor, y: Tensor, strength: float = 1.0) -> LinearProbe:
    """x `(rows, d)`, y `(rows,)` or `(rows, outputs)` numbers; closed form."""
    _positive(strength)
    scaled, mean, deviation = _standard(x)
    target = (y if y.dim() == 2 else y[:, None]).double()
    middle = target.mean(0)
    u, s, vt = torch.linalg.svd(scaled, full_matrices=False)
    shrunk = s / (s.pow(2) + 1 / strength)
    weight = (vt.mT * shrunk) @ (u.mT @ (target - middle))
    return LinearProbe(weight.mT, middle, mean, deviation, 0)


def _standard(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    # a feature that never changes says nothing, and must not be divided by rounding
    deviation = torch.where(deviation > 1e-9 * (1 + mean.abs()), deviation, 1.0)
    return (x - mean) / deviation, mean, deviation


def _positive(strength: float) -> None:
    if not strength > 0:
        raise ValueError(f"strength={strength}: expected a positive number")
