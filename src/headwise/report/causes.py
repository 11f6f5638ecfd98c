"""The section on causes: effects of taking heads out against what the heads look like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from headwise.instruments.atlas import Atlas
from headwise.instruments.disagreement import DEFAULT, correlational, disagreement
from headwise.report.naming import label

__all__ = ["cause_sentence", "causes"]

_HOW = {
    "zero": "its output is nothing",
    "mean": "its output is its mean over examples",
    "resample": "its output is another example's",
    "uniform": "its map is even over all that it may see, its values stay",
}


def causes(atlas: Atlas) -> dict[str, Any] | None:
    """What the section shows; None for an atlas without effects, or with nothing beside them."""
    if "effect" not in atlas.heads or not np.isfinite(atlas.heads["effect"]).any():
        return None
    there = correlational(atlas)
    ordered = [name for name in DEFAULT if name in there]
    ordered += [name for name in there if name not in ordered]
    if not ordered:
        return None
    against = {}
    for name in ordered:
        found = disagreement(atlas, name)
        assert found is not None
        against[name] = {
            "rho": None if math.isnan(found.correlation) else round(found.correlation, 3),
            "heads": found.heads,
            "over": list(found.over),
            "under": list(found.under),
            "sentences": found.sentences(atlas, label(name)),
        }
    known = atlas.provenance.get("cause") or {}
    return {
        "metric": named(known),
        "about": _about(known),
        "against": against,
        "estimates": [
            [str(name), None if value is None else float(value)]
            for name, value in (known.get("rank_correlation") or {}).items()
        ],
    }


def cause_sentence(atlas: Atlas) -> str:
    """Which head matters most, in one sentence; empty for an atlas without effects."""
    effect = atlas.heads.get("effect")
    if effect is None or not np.isfinite(effect).any():
        return ""
    row = int(np.nanargmax(np.abs(np.where(np.isfinite(effect), effect, np.nan))))
    metric = named(atlas.provenance.get("cause") or {})
    return f"Taking out {atlas.name(row)} changes the {metric} most, by {effect[row]:+.2g}."


def named(known: dict[str, Any]) -> str:
    """What the metric is called in a sentence."""
    metric = str(known.get("metric") or "metric")
    return {"kl": "divergence"}.get(metric, metric)


def _about(known: dict[str, Any]) -> str:
    metric, how = named(known), str(known.get("how") or "")
    compares = known.get("metric") == "kl"  # itself a comparison with the unchanged model
    up = f"the {metric} without the head minus the {metric} with it"
    up = (
        "how far the answers without the head are from those with it (KL divergence)" * compares
        or up
    )
    words = [f"What a head looks like is not what it causes. Up: {up}"]
    examples = known.get("examples")
    if isinstance(examples, int):
        words.append(f", mean over {examples:,} example{'s' * (examples != 1)}")
    base = known.get("unchanged")
    if isinstance(base, int | float) and math.isfinite(base) and not compares:
        words.append(f" (unchanged: {base:.3g})")
    if how in _HOW:
        words.append(f". A head is taken out by {how}: {_HOW[how]}")
    if known.get("frozen"):
        words.append(", and all maps stay as they were")
    better = {"lower": "above zero", "higher": "below zero"}.get(str(known.get("better") or ""))
    if better and not compares:
        words.append(f". Heads {better} are of use")
    return "".join(words) + ". Bars are two standard errors."
