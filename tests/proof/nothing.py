"""What stands where a model has no MLP."""

import torch
from torch import Tensor, nn


class Nothing(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
