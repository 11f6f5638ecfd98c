"""A matrix fitted to targets by closed form, near to what it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.compress.structure.matrices import bias_of
from headwise.compress.structure.moments import Moments
from headwise.models.projections import features_first

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the mean square of an input feature: what is tried where no ridge is given."""


@dataclass(frozen=True)
class Fit:
    """What fitting one matrix did. before, after: |y - W x - b|^2 over |y|^2, on all tokens.
    ridge: the one used, None where the matrix was left as it was because nothing helped."""

    before: float
    after: float
    ridge: float | None


class Problem:
    """Moments of inputs and targets, of most tokens and of a held-out rest to choose a ridge by."""

    def __init__(self) -> None:
        self.fitted, self.held, self.whole = Moments(), Moments(), Moments()

    def add(self, x: Tensor, y: Tensor) -> None:
        """x `(tokens, in)`, y `(tokens, out)`; the last quarter is held out."""
        cut = len(x) - len(x) // 4
        self.fitted.add(x[:cut], y[:cut])
        self.held.add(x[cut:], y[cut:])
        self.whole.add(x, y)

    @torch.no_grad()
    def solve(self, matrix: nn.Module, ridge: float | None = None) -> Fit:
        """Write into `matrix` the weight and, where it has one, the bias that minimise

            sum |y - W x - b|^2 + ridge * mean square of x * tokens * |W - W_0|^2

        and say what that did. ridge None: the best of `RIDGES` on the held-out tokens, or no
        change at all if that is best there.
        """
        bias = bias_of(matrix)
        weight = features_first(matrix)
        start = _map(matrix)
        whole = _Squares(self.whole, start.shape[1])
        before = whole.error(start)
        chosen = ridge
        if chosen is None:
            held, fitted = (_Squares(m, start.shape[1]) for m in (self.held, self.fitted))
            least, missing = held.error(start), fitted.missing(start)
            for tried in RIDGES:
                error = held.error(start + fitted.change(missing, tried))
                if error < least:
                    least, chosen = error, tried
        if chosen is None:
            return Fit(before, before, None)
        found = start + whole.change(whole.missing(start), chosen)
        weight.copy_(found[:, : weight.shape[1]])
        if bias is not None:
            bias.copy_(found[:, -1])
        return Fit(before, whole.error(found), chosen)

    def error(self, matrix: nn.Module) -> float:
        """|y - W x - b|^2 over |y|^2 of a matrix as it is."""
        map_ = _map(matrix)
        return _Squares(self.whole, map_.shape[1]).error(map_)


def _map(matrix: nn.Module) -> Tensor:
    """Weight and bias side by side `(out, in [+ 1])`, float64."""
    weight, bias = features_first(matrix).detach().double(), bias_of(matrix)
    return weight if bias is None else torch.cat([weight, bias.detach().double()[:, None]], 1)


class _Squares:
    """Sums of x x^T and y x^T, where x ends in a 1 if the map `(out, size)` has a bias."""

    def __init__(self, moments: Moments, size: int) -> None:
        square, cross = moments.square, moments.cross
        self.energy, self.count = moments.energy, max(1, moments.count)
        self.mean, self.wide = square.diagonal().mean(), len(square)
        if size > self.wide:
            one = square.new_full((1, 1), float(moments.count))
            total = moments.total[:, None]
            square = torch.cat([torch.cat([square, total], 1), torch.cat([total.T, one], 1)])
            cross = torch.cat([cross, moments.target[:, None]], 1)
        self.square, self.cross = square, cross

    def error(self, map_: Tensor) -> float:
        """|y - W x - b|^2 over |y|^2."""
        left = self.energy - 2 * (map_ * self.cross).sum() + ((map_ @ self.square) * map_).sum()
        return float(left.clamp_min(0)) / max(self.energy, 1e-300)

    def missing(self, start: Tensor) -> Tensor:
        """What a change of the map has to explain, `(size, out)`."""
        return (self.cross - start @ self.square).T

    def change(self, missing: Tensor, ridge: float) -> Tensor:
        """The one of least error, with the ridge on it."""
        pull = torch.zeros(len(self.square), dtype=self.square.dtype, device=self.square.device)
        pull[: self.wide] = ridge * self.mean
        pull[self.wide :] = 1e-9 * self.count  # a bias is free
        pulled = self.square + pull.diag()
        factor, failed = torch.linalg.cholesky_ex(pulled)
        if int(failed):  # by rounding: a feature that never changes, beside a bias
            return torch.linalg.solve(pulled, missing).T
        return torch.cholesky_solve(missing, factor).T
