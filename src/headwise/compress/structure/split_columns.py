"""A linear layer of which some columns are trained: fine-tuning that costs its share only.

Selected columns as one dense block (S2FT, arXiv 2412.06289, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.models.projections import features_first


class Split(nn.Module):
    """y = x[:k] T^T + x[k:] F^T + b with T `(out, k)` trained and F `(out, in - k)` fixed. Only
    x[:k] is kept for the backward pass."""

    frozen: Tensor
    before: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Module, trained: int) -> None:
        super().__init__()
        table = features_first(linear).detach()
        self.trained = nn.Parameter(table[:, :trained].clone())
        self.register_buffer("frozen", table[:, trained:].clone())
        bias = getattr(linear, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("before", self.trained.detach().clone())

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.trained, self.frozen], 1)

    def forward(self, x: Tensor) -> Tensor:
        k = self.trained.shape[1]
        chosen = x[..., :k].contiguous()  # a view would keep all of x
        return F.linear(chosen, self.trained) + F.linear(x[..., k:], self.frozen, self.bias)

    def adapter(self) -> Tensor:
        """What training has changed, `(out, k)`."""
        return self.trained.detach() - self.before

    def put(self, adapter: Tensor | None) -> None:
        """The base weights with an adapter on, or None."""
        with torch.no_grad():
            self.trained.copy_(self.before if adapter is None else self.before + adapter)
