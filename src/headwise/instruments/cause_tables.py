"""Effects as columns of an Atlas: of one example, of all of them, and beside other columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headwise.instruments.ablated_parts import Part
from headwise.instruments.atlas import Atlas
from headwise.instruments.effect_gradients import ESTIMATES
from headwise.instruments.effect_ranks import rank_correlation
from headwise.instruments.head_rows import rows_of
from headwise.instruments.partial import Result
from headwise.models import ModelView

__all__ = ["CAUSAL", "as_columns", "assembled", "beside"]

CAUSAL = ("effect", "effect_gradient", "effect_integrated")
"""Head columns of causes; each layer column of one ends in `_effect`."""

_LAYER = {"layers": "layer_effect", "mlp": "mlp_effect"}


def as_columns(
    view: ModelView,
    own: Mapping[str, np.ndarray],
    parts: Mapping[str, Sequence[Part]],
    seconds: float,
) -> Result:
    """One example's numbers. own: `(parts,)` by sort of part, by estimate, and "unchanged"."""
    heads = {f"effect_{name}": own[name] for name in ESTIMATES if name in own}
    if "heads" in own:
        heads = {"effect": own["heads"], **heads}
    places = {(layer.stack, layer.index): n for n, layer in enumerate(view.layers)}
    layers: dict[str, np.ndarray] = {}
    for kind, some in parts.items():
        if kind == "heads" or kind not in own:
            continue
        for part, value in zip(some, own[kind], strict=True):
            (site,) = part.takes
            cross = "cross_" if site.attention == "cross" else ""
            name = _LAYER.get(kind, f"{cross}attention_effect")
            at = (site.stack or view.stacks[0], site.layer - (kind == "layers"))
            column = layers.setdefault(name, np.full(len(view.layers), np.nan))
            column[places[at]] = value
    layers["unchanged"] = np.broadcast_to(own["unchanged"], (len(view.layers),)).copy()
    return Result(heads, layers, seconds=seconds)


def assembled(view: ModelView, results: Sequence[Result], cause: dict[str, Any]) -> Atlas:
    """Means over examples with standard errors. The provenance holds "cause" with the unchanged
    model's mean and each estimate's rank correlation with the exact effect."""
    heads, layers = rows_of(view)
    spread: dict[str, np.ndarray] = {}
    for name in results[0].heads:
        heads[name], error = _mean([result.heads[name] for result in results])
        if name == "effect":
            heads["effect_se"] = error
        spread[name] = error
    unchanged, unsure = _mean([result.layers["unchanged"][:1] for result in results])
    for name in results[0].layers:
        if name != "unchanged":
            layers[name], layers[f"{name}_se"] = _mean([r.layers[name] for r in results])
    cause = {**cause, "unchanged": float(unchanged[0]), "unchanged_se": _number(unsure[0])}
    if "effect" in heads:
        found = {
            name: _number(rank_correlation(heads[f"effect_{name}"], heads["effect"]))
            for name in ESTIMATES
            if f"effect_{name}" in heads
        }
        cause |= {"rank_correlation": found} if found else {}
    return Atlas(heads=heads, layers=layers, spread=spread, provenance={"cause": cause})


def beside(atlas: Atlas, causes: Atlas) -> Atlas:
    """The atlas with the other one's causal columns instead of its own, and with where they come
    from under "cause" of its provenance.

    Raises ValueError where the two are not of the same weights, or do not have the same heads.
    """
    was, now = (a.provenance.get("weights_hash") for a in (atlas, causes))
    if was and now and was != now:
        raise ValueError(
            "the atlas is of other weights than the effects (or of the same in another dtype): "
            f"{was[:20]}..., now {now[:20]}...; measure the atlas anew, or into another folder"
        )
    for key in ("layer", "head", "stack", "attention"):
        a, b = atlas.heads.get(key), causes.heads.get(key)
        if a is not b if a is None or b is None else not np.array_equal(a, b):
            raise ValueError(f"the atlas has other heads than the effects (column {key!r})")
    mine = {name for name in causes.heads if name.startswith("effect")}
    heads = {n: v for n, v in atlas.heads.items() if not n.startswith("effect_") and n != "effect"}
    layers = {n: v for n, v in atlas.layers.items() if "_effect" not in n}
    facts = ("texts", "settings", "seconds", "command", "date", "edits")
    cause = causes.provenance["cause"]
    cause = cause | {key: causes.provenance[key] for key in facts if key in causes.provenance}
    return Atlas(
        heads=heads | {name: causes.heads[name] for name in causes.heads if name in mine},
        layers=layers | {n: v for n, v in causes.layers.items() if "_effect" in n},
        columns={n: c for n, c in atlas.columns.items() if n in heads or n in layers},
        pairs=atlas.pairs,
        spread={n: v for n, v in atlas.spread.items() if n in heads} | causes.spread,
        reasons=atlas.reasons,
        tiles=atlas.tiles,
        provenance=atlas.provenance | {"cause": cause},
    )


def _mean(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over examples and its standard error, NaN for a single one."""
    table = np.stack(values)
    count = len(table)
    error = table.std(0, ddof=1) / count**0.5 if count > 1 else np.full(table.shape[1:], np.nan)
    return table.mean(0), error


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
