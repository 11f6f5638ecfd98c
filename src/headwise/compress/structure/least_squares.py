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
        before = self._error(self.whole, start)
        chosen = ridge
        if chosen is None:
            least = self._error(self.held, start)
            for tried in RIDGES:
                error = self._error(self.held, _solved(self.fitted, start, tried))
                if error < least:
                    least, chosen = error, tried
        if chosen is None:
            return Fit(before, before, None)
        found = _solved(self.whole, start, chosen)
        weight.copy_(found[:, : weight.shape[1]])
        if bias is not None:
            bias.copy_(found[:, -1])
        return Fit(before, self._error(self.whole, found), chosen)

    def error(self, matrix: nn.Module) -> float:
        """|y - W x - b|^2 over |y|^2 of a matrix as it is."""
        return self._error(self.whole, _map(matrix))

    def _error(self, moments: Moments, map_: Tensor) -> float:
        square, cross = _augmented(moments, map_.shape[1])
        left = moments.energy - 2 * (map_ * cross).sum() + ((map_ @ square) * map_).sum()
        return float(left.clamp_min(0)) / max(moments.energy, 1e-300)


def _map(matrix: nn.Module) -> Tensor:
    """Weight and bias side by side `(out, in [+ 1])`, float64."""
    weight, bias = features_first(matrix).detach().double(), bias_of(matrix)
    return weight if bias is None else torch.cat([weight, bias.detach().double()[:, None]], 1)


def _augmented(moments: Moments, size: int) -> tuple[Tensor, Tensor]:
    """Sums of x x^T and y x^T, where x ends in a 1 if the map has a bias."""
    square, cross = moments.square, moments.cross
    if size == len(square):
        return square, cross
    one = square.new_full((1, 1), float(moments.count))
    total = moments.total[:, None]
    whole = torch.cat([torch.cat([square, total], 1), torch.cat([total.T, one], 1)])
    return whole, torch.cat([cross, moments.target[:, None]], 1)


def _solved(moments: Moments, start: Tensor, ridge: float) -> Tensor:
    square, cross = _augmented(moments, start.shape[1])
    wide = len(moments.square)
    pull = torch.zeros(len(square), dtype=square.dtype, device=square.device)
    pull[:wide] = ridge * moments.square.diagonal().mean()
    pull[wide:] = 1e-9 * max(1, moments.count)  # a bias is free
    change = torch.linalg.solve(square + pull.diag(), (cross - start @ square).T)
    return start + change.T
