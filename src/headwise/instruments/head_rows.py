"""The rows of an Atlas: which head, and which layer, each of them is."""

from __future__ import annotations

import numpy as np

from headwise.models import ModelView

__all__ = ["rows_of"]

Table = dict[str, np.ndarray]


def rows_of(view: ModelView) -> tuple[Table, Table]:
    """The identity columns of all heads and of all layers, in order of execution: `layer` and
    `head`; with several stacks, or cross-attention, also `stack` and (of heads) `attention`."""
    rows = [(a, head) for a in view.attentions for head in range(a.heads)]
    heads = {
        "layer": np.array([a.layer for a, _ in rows]),
        "head": np.array([head for _, head in rows]),
    }
    layers = {"layer": np.array([layer.index for layer in view.layers])}
    if len(view.stacks) > 1 or any(a.kind == "cross" for a in view.attentions):
        heads["stack"] = np.array([a.stack for a, _ in rows])
        heads["attention"] = np.array([a.kind for a, _ in rows])
        layers["stack"] = np.array([layer.stack for layer in view.layers])
    return heads, layers
