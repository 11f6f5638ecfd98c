"""Neighbouring layers become one."""

from __future__ import annotations

import torch
from torch import nn

from headwise.compress.structure.layers import drop_layers
from headwise.compress.structure.sharing import modules_of, require_alike
from headwise.instruments.examples import model_view
from headwise.models import ModelView

METHODS = ("delta", "average")


def merge_layers(
    model: nn.Module | ModelView,
    first: int,
    count: int,
    method: str = "delta",
    strength: float = 1.0,
    stack: str | None = None,
) -> None:
    """Make one layer of the `count` layers from `first` on, for good.

        merge_layers(model, 6, 3)              # layers 6, 7 and 8

    method: "delta", the first layer's weights plus `strength` times what the others differ from
    them, w + sum of (w_k - w) (LaCo, Yang et al. 2024, arXiv 2402.11187, eq. 3); "average", their
    mean. No text is needed; `compensate` and `distil` recover more. The others are dropped.

    Raises ValueError for layers that are not there or differ in shapes; the model is then as it
    was.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    look = model_view(model)
    modules = modules_of(look, "layer", stack)
    if count < 2 or not 0 <= first <= len(modules) - count:
        raise ValueError(
            f"first={first}, count={count}: expected 2 or more of layers 0 to {len(modules) - 1}"
        )
    span = range(first, first + count)
    for place in span:
        require_alike(modules[place], modules[first], place, first)
    weights = [[p for m in modules[place] for p in m.parameters()] for place in span]
    if len({id(p) for layer in weights for p in layer}) < sum(map(len, weights)):
        raise ValueError(f"layers {first} to {first + count - 1} share weights already")
    drop_layers(look.model, span[1:], stack=stack)
    with torch.no_grad():
        for same in zip(*weights, strict=True):
            mean = torch.stack([p.double() for p in same]).mean(0)
            scale = strength * count if method == "delta" else 1.0
            same[0].copy_(same[0] + scale * (mean - same[0].double()))
