"""Feed-forward layers that skip the neurons whose gate is near zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import child, features_first

__all__ = ["InputMajor", "Parts", "Thresholded", "parts_of"]

GATED = (("gate_proj", "up_proj", "down_proj"), ("gate", "up", "down"), ("w1", "w3", "w2"))
"""Children of a feed-forward layer with a gate: down(act(gate(x)) * up(x))."""

PLAIN = (("c_fc", "c_proj"), ("fc1", "fc2"), ("up", "down"), ("dense_h_to_4h", "dense_4h_to_h"))
"""Children of one without: down(act(first(x)))."""

ACTIVATIONS = ("act_fn", "act", "activation", "activation_fn", "activation_function")

_TILE = 1 << 15
"""Weights gathered at a time: a piece that stays in cache, in memory that is used again."""

Parts = tuple[nn.Module, nn.Module | None, nn.Module, Callable[[Tensor], Tensor]]
"""What is thresholded after the activation (the gate, or the only one), up, down, activation."""


class InputMajor(nn.Module):
    """y = x W + b with W kept as `(in, out)`, so that what one input feature adds lies together.
    transformers' Conv1D has the same layout, and models are viewed through the same `nf`."""

    def __init__(self, in_features: int, out_features: int, bias: bool, **where: Any) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **where))
        self.bias = nn.Parameter(torch.empty(out_features, **where)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        made = x @ self.weight
        return made if self.bias is None else made + self.bias


class Thresholded(nn.Module):
    """down(g * up(x)) with g = act(gate(x)), set to zero where |g_i| <= thresholds[i]; without an
    up, down(g).

    For one token on a CPU, outside of training, rows of up and of down that belong to zeros are
    neither read nor multiplied (which pays where about two thirds are skipped, and wide layers);
    several tokens take the dense path with the same zeros.

    Dropout that the layer had inside is gone: this is for inference.

    `thresholds` `(hidden,)`. `kept`: the neurons that the last single token used.
    """

    thresholds: Tensor

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module | None,
        down: nn.Module,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        weight = features_first(down)
        where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        width, hidden = weight.shape
        held = getattr(down, "bias", None)
        self.gate, self.up = gate, up
        self.down = InputMajor(hidden, width, held is not None, **where)
        with torch.no_grad():
            self.down.weight.copy_(weight.t())
            if self.down.bias is not None and held is not None:
                self.down.bias.copy_(held)
        self.activation = activation
        zeros = torch.zeros(hidden, device=weight.device)
        self.register_buffer("thresholds", zeros)
        self.kept: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate(x))
        alone = gate.numel() == len(self.thresholds) and gate.device.type == "cpu"
        if alone and not torch.is_grad_enabled() and not self.training:
            return self._skip(x, gate)
        gate = torch.where(gate.abs() > self.thresholds, gate, 0)
        return self.down(gate if self.up is None else gate * self.up(x))

    def _skip(self, x: Tensor, gate: Tensor) -> Tensor:
        flat = gate.flatten()
        chosen = (flat.abs() > self.thresholds).nonzero().flatten()
        self.kept = len(chosen)
        active = flat.index_select(0, chosen)
        if self.up is not None:
            active = active * self._rows_of_up(x.flatten(), chosen)
        # a weighted sum of rows: nothing is copied
        made = F.embedding_bag(
            chosen,
            self.down.weight,
            chosen.new_zeros(1),
            mode="sum",
            per_sample_weights=active.to(self.down.weight.dtype),
        )
        if self.down.bias is not None:
            made = made + self.down.bias
        return made.view(*x.shape[:-1], -1)

    def _rows_of_up(self, x: Tensor, chosen: Tensor) -> Tensor:
        assert self.up is not None
        weight = features_first(self.up)
        step = max(1, _TILE // weight.shape[1])
        pieces = [weight.index_select(0, some) @ x for some in chosen.split(step)]
        made = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        bias = getattr(self.up, "bias", None)
        return made if bias is None else made + bias.index_select(0, chosen)

    def extra_repr(self) -> str:
        return f"hidden={len(self.thresholds)}, gated={self.up is not None}"


def parts_of(mlp: nn.Module | None, where: str) -> Parts:
    """Raises UnsupportedModelError for a feed-forward layer that is built in another way."""
    if mlp is not None:
        activation = next(
            (held for name in ACTIVATIONS if callable(held := getattr(mlp, name, None))), None
        )
        for names in (*GATED, *PLAIN):
            found = [child(mlp, name) for name in names]
            modules = [m for m in found if m is not None]
            # a module of its own that holds anything else may compute anything else
            others = [
                m for m in mlp.children() if m not in modules and any(True for _ in m.parameters())
            ]
            plain = all(isinstance(m, nn.Linear) or hasattr(m, "nf") for m in modules)
            if len(modules) == len(names) and plain and activation is not None and not others:
                up = modules[1] if len(names) == 3 else None
                return modules[0], up, modules[-1], activation
    kind = "none" if mlp is None else type(mlp).__name__
    raise UnsupportedModelError(
        f"{where}: thresholds need a feed-forward layer of two or three linear maps and an "
        f"activation; found {kind}"
    )
