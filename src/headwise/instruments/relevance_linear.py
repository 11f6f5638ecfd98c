"""The gamma rule of a linear map, as a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["shared_linear"]


class _Gamma(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float, epsilon: float
    ) -> Tensor:
        z = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, z)
        ctx.bias, ctx.gamma, ctx.epsilon = bias, gamma, epsilon
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight, z = ctx.saved_tensors
        gamma = ctx.gamma
        more, less = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
        above, below = x.clamp(min=0), x.clamp(max=0)
        relevance, upward = grad * z, z >= 0
        bias = torch.zeros((), dtype=z.dtype, device=z.device) if ctx.bias is None else ctx.bias
        # x_i w_ij + gamma (x_i w_ij)^+ where z_j >= 0, + gamma (x_i w_ij)^- where it is not
        up = above @ more.T + below @ less.T + bias + gamma * bias.clamp(min=0)
        down = above @ less.T + below @ more.T + bias + gamma * bias.clamp(max=0)
        total = torch.where(upward, up, down)
        floor = max(ctx.epsilon, 1e-12)
        share = relevance / (total + torch.where(upward, floor, -floor))
        rise, fall = share * upward, share * ~upward
        found = torch.where(x >= 0, rise @ more + fall @ less, rise @ less + fall @ more)
        return found, None, None, None, None


def shared_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float, epsilon: float = 0.0
) -> Tensor:
    """x `(..., in)` to x W^T + b, weight `(out, in)`. Its gradient shares relevance out by the
    gamma rule (Montavon et al. 2019, "Layer-wise relevance propagation: an overview", table 1) in
    the form for inputs and outputs of any sign: contributions of the sign of the output count
    1 + gamma times."""
    found: Tensor = _Gamma.apply(x, weight, bias, gamma, epsilon)
    return found
