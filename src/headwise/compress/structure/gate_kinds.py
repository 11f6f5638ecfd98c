"""Random gates whose parameters say how much of a unit is needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Gates of `units` units. `draw(count)` gives `(count, units)` values, with gradients;
    `open()` `(units,)` in [0, 1] how much each counts as kept; `penalty()` what is minimised
    beside the task, before its weight; `value()` the gate when nothing is drawn; `score()` what
    units are ranked by, larger is more needed."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        raise NotImplementedError

    def open(self) -> Tensor:
        raise NotImplementedError

    def penalty(self) -> Tensor:
        raise NotImplementedError

    def value(self) -> Tensor:
        raise NotImplementedError

    def score(self) -> Tensor:
        raise NotImplementedError


class Variational(Gate):
    """z = mu + sigma eps, the information bottleneck's gate (Dai et al. 2018, arXiv 1802.10399,
    eq. 7 and 8; VTrans, Dutta et al. 2024, arXiv 2406.05276).

    What a unit lets through costs 1/2 log(1 + mu^2 / sigma^2) nats: KL(N(mu, sigma^2) ||
    N(0, s^2)) with the prior variance s^2 = mu^2 + sigma^2, which makes it least. Units with
    log(sigma^2 / mu^2) above 0 are more noise than signal and are pruned. `open` is the share of
    the signal, mu^2 / (mu^2 + sigma^2), 1/2 at that threshold.
    """

    def __init__(self, units: int, start: float = 1.0, log_variance: float = -4.0) -> None:
        super().__init__(units)
        self.mu = nn.Parameter(torch.full((units,), start))
        self.log_variance = nn.Parameter(torch.full((units,), log_variance))

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        noise = torch.randn(count, self.units, generator=random).to(self.mu)
        return self.mu + (self.log_variance / 2).exp() * noise

    def ratio(self) -> Tensor:
        """log(mu^2 / sigma^2) `(units,)`."""
        return self.mu.square().clamp_min(1e-12).log() - self.log_variance

    def open(self) -> Tensor:
        return self.ratio().sigmoid()

    def penalty(self) -> Tensor:
        return nn.functional.softplus(self.ratio()).sum() / 2

    def value(self) -> Tensor:
        return self.mu

    def score(self) -> Tensor:
        return self.ratio()


class HardConcrete(Gate):
    """Gates in [0, 1] that are often exactly 0 or 1 (Louizos et al. 2017, arXiv 1712.01312, eq. 10
    to 12; on heads: Voita et al. 2019, arXiv 1905.09418).

    z = clamp(s (zeta - gamma) + gamma, 0, 1), s = sigmoid((log u - log(1 - u) + log alpha) / beta).
    `open` is the probability of z > 0, the expected L0 norm of the unit.
    """

    beta, gamma, zeta = 2 / 3, -0.1, 1.1

    def __init__(self, units: int, start: float = 2.0) -> None:
        super().__init__(units)
        self.log_alpha = nn.Parameter(torch.full((units,), start))

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        u = torch.rand(count, self.units, generator=random).clamp(1e-6, 1 - 1e-6)
        u = u.to(self.log_alpha)
        return self._stretched(((u.log() - (-u).log1p() + self.log_alpha) / self.beta).sigmoid())

    def _stretched(self, s: Tensor) -> Tensor:
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def open(self) -> Tensor:
        return (self.log_alpha - self.beta * math.log(-self.gamma / self.zeta)).sigmoid()

    def penalty(self) -> Tensor:
        return self.open().sum()

    def value(self) -> Tensor:
        return self._stretched(self.log_alpha.sigmoid())

    def score(self) -> Tensor:
        return self.log_alpha


GATES: dict[str, type[Gate]] = {"variational": Variational, "l0": HardConcrete}
