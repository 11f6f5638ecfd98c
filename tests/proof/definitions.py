"""Columns of an Atlas by their definitions, from the eager matrices that a model returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.proof.eager import matrices

TOKENS = ("mean_distance", "distance_std", "effective_keys")
"""Columns in tokens or keys: their differences are compared in units of the length."""


def columns_of(p: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Of one text `(heads, n, n)` with token ids `(n,)`, in float64."""
    n = p.shape[-1]
    causal = bool((p.triu(1) == 0).all())
    i, j = torch.arange(n)[:, None], torch.arange(n)
    back = i - j
    entropy = -torch.xlogy(p, p).sum(-1)
    received = p.sum(-2)
    mean = (p * back).sum(-1)
    visible = torch.arange(1, n + 1).double() if causal else torch.full((n,), float(n))

    def mass(keys: Tensor) -> Tensor:
        return (p * keys).sum(-1).mean(-1)

    before = torch.cat([torch.tensor([-1]), ids[:-1]])
    same = (ids[:, None] == ids) & (back != 0)
    follows = (ids[:, None] == before) & (back != 0) & (back != -1)
    seen_by = (n - torch.arange(n)) if causal else torch.full((n,), n)
    sinks = (received > 0.3 * seen_by) & (seen_by >= min(16, n // 4))
    profile = torch.stack([p.diagonal(-d, -2, -1).sum(-1) / n for d in range(1 - 8, 8)], -1)
    near = torch.zeros(*p.shape[:2], 15, dtype=p.dtype)
    for place, d in enumerate(range(1 - 8, 8)):
        near[:, max(d, 0) : n + min(d, 0), place] = p.diagonal(-d, -2, -1)
    return {
        "sink_mass": p[:, :, 0].mean(-1),
        "found_sink_mass": (received * sinks).sum(-1) / n,
        "dormant_share": ((received * (sinks | (j == 0))).sum(-1) / n > 0.5).double(),
        "received_concentration": (received / n).square().sum(-1),
        "entropy": entropy.mean(-1),
        "entropy_share": entropy.sum(-1) / visible.log().sum(),
        "effective_keys": entropy.exp().mean(-1),
        "max_weight": p.amax(-1).mean(-1),
        "mean_distance": mean.mean(-1),
        "distance_std": (p * (back - mean[..., None]) ** 2).sum(-1).sqrt().mean(-1),
        "self_mass": mass(back == 0),
        "previous_mass": mass(back == 1),
        "next_mass": mass(back == -1),
        "local_8": mass(back.abs() < 8),
        "local_64": mass(back.abs() < 64),
        "positional": torch.minimum(near, profile[:, None]).sum(-1).mean(-1),
        "same_token": mass(same),
        "induction_text": mass(follows),
    }


def columns_by_definition(model: Any, texts: list[Tensor]) -> dict[str, np.ndarray]:
    """Means over texts `(1, n)` of each column `(all heads,)`, as an Atlas has them."""
    found: dict[str, list[np.ndarray]] = {}
    for ids in texts:
        by_layer = [
            columns_of(p[0].double(), ids[0]) for p in matrices(model, {"input_ids": ids}).values()
        ]
        for name in by_layer[0]:
            column = torch.cat([layer[name] for layer in by_layer])
            found.setdefault(name, []).append(column.numpy())
    return {name: np.mean(columns, axis=0) for name, columns in found.items()}


def furthest(atlas: Any, model: Any, texts: list[Tensor]) -> dict[str, float]:
    """Largest difference of each column from its definition."""
    right = columns_by_definition(model, texts)
    length = max(ids.shape[1] for ids in texts)
    return {
        name: float(np.abs(atlas.heads[name] - column).max()) / (length if name in TOKENS else 1)
        for name, column in right.items()
    }
