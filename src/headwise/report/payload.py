"""The atlas as the page reads it: plain JSON with rounded numbers and null for "not measured"."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwise.instruments.atlas import Atlas, Column
from headwise.instruments.kinds import THRESHOLDS
from headwise.report.causes import causes
from headwise.report.naming import GROUPS, OTHER, group, label, rules
from headwise.report.pieces import alike, neighbours, tiles
from headwise.report.sentence import facts, sentences

__all__ = ["Detail", "numbers", "payload"]

_IDENTITY = ("layer", "head", "stack", "attention", "kind")


@dataclass(frozen=True)
class Detail:
    """How much of an atlas goes onto the page.

    tile: tokens of a tile at most, 0 for none; pairs: which similarities of all pairs of heads;
    spread: standard errors; digits: significant digits of a number.
    """

    tile: int = 64
    pairs: tuple[str, ...] = ("similarity", "similarity_rest")
    spread: bool = True
    digits: int = 5


def payload(atlas: Atlas, detail: Detail, title: str | None = None) -> dict[str, Any]:
    """Everything that the page shows."""
    known = atlas.provenance
    similarities = alike(atlas, detail.pairs)
    return {
        "title": str(title or known.get("model") or "A model"),
        "eyebrow": "What every attention head does",
        "sentences": sentences(atlas),
        "notes": [],
        "metric": "kind",
        "changes": None,
        "cause": causes(atlas),
        "facts": facts(atlas),
        "heads": _heads(atlas),
        "panels": _panels(atlas),
        "columns": _columns(atlas, detail),
        "groups": [*GROUPS, OTHER],
        "layers": _layers(atlas, detail),
        "definitions": _definitions(atlas),
        "kinds": rules(),
        "alike": similarities,
        "neighbours": neighbours(atlas),
        "tiles": tiles(atlas, detail.tile),
        "thresholds": {"sink": THRESHOLDS.dormant, "writes": 25, "alike": 0.9},
        "provenance": _plain(known),
        "left_out": _left_out(atlas, detail, tuple(similarities)),
    }


def _heads(atlas: Atlas) -> dict[str, Any]:
    heads = atlas.heads
    count = len(atlas)
    places = [panel["id"] for panel in _panels(atlas)]
    return {
        "layer": heads["layer"].tolist(),
        "head": heads["head"].tolist(),
        "panel": [places.index(_place(atlas, row)) for row in range(count)],
        "kind": heads["kind"].tolist() if "kind" in heads else None,
        "reason": [str(reason) for reason in atlas.reasons],
        "name": [atlas.name(row) for row in range(count)],
    }


def _panels(atlas: Atlas) -> list[dict[str, str]]:
    """One panel a stack and attention, in the order of the table."""
    found: dict[str, dict[str, str]] = {}
    for row in range(len(atlas)):
        stack, attention = _part(atlas, "stack", row), _part(atlas, "attention", row)
        name = f"{stack}.{attention}".strip(".")
        found.setdefault(name, {"id": name, "stack": stack, "attention": attention})
    return list(found.values())


def _place(atlas: Atlas, row: int) -> str:
    return f"{_part(atlas, 'stack', row)}.{_part(atlas, 'attention', row)}".strip(".")


def _part(atlas: Atlas, key: str, row: int) -> str:
    return str(atlas.heads[key][row]) if key in atlas.heads else ""


def _columns(atlas: Atlas, detail: Detail) -> list[dict[str, Any]]:
    """The head metrics, by group and in the group's order; names and indices are no metrics."""
    found = []
    for name, values in atlas.heads.items():
        column = atlas.columns.get(name) or Column(name, "", "")
        if name in _IDENTITY or column.unit == "index" or values.dtype.kind not in "fiub":
            continue
        if _is_error(name, atlas.heads):
            continue
        entry = _column(name, column, values, detail.digits) | {"group": group(column)}
        if detail.spread and name in atlas.spread:
            entry["spread"] = numbers(atlas.spread[name], 3)
        found.append(entry)
    order = [column for members in GROUPS.values() for column in members]
    groups = [*GROUPS, OTHER]
    return sorted(
        found,
        key=lambda c: (
            groups.index(c["group"]),
            order.index(c["name"]) if c["name"] in order else len(order),
        ),
    )


def _layers(atlas: Atlas, detail: Detail) -> dict[str, Any]:
    table = atlas.layers
    count = len(next(iter(table.values()), ()))
    stacks = table.get("stack")
    return {
        "layer": table["layer"].tolist() if "layer" in table else list(range(count)),
        "stack": [""] * count if stacks is None else stacks.tolist(),
        "columns": [
            _column(name, atlas.columns.get(name) or Column(name, "", ""), values, detail.digits)
            for name, values in table.items()
            if name not in _IDENTITY and values.dtype.kind in "fiub" and not _is_error(name, table)
        ],
    }


def _is_error(name: str, table: dict[str, np.ndarray]) -> bool:
    """Whether this is the standard error of another column, which is no figure of its own."""
    return name.endswith("_se") and name.removesuffix("_se") in table


def _column(name: str, column: Column, values: np.ndarray, digits: int) -> dict[str, Any]:
    return {
        "name": name,
        "label": label(name),
        "unit": column.unit,
        "description": column.description,
        "values": numbers(values, digits),
    }


def _definitions(atlas: Atlas) -> list[dict[str, str]]:
    """Every column of both tables and every description, each once."""
    names: Iterable[str] = dict.fromkeys((*atlas.heads, *atlas.layers, *atlas.columns))
    return [
        {
            "name": name,
            "table": " and ".join(t for t in ("heads", "layers") if name in getattr(atlas, t))
            or "described only",
            "unit": column.unit,
            "description": column.description,
            "source": column.source,
        }
        for name in names
        for column in [atlas.columns.get(name) or Column(name, "", "no description was given")]
    ]


def _left_out(atlas: Atlas, detail: Detail, paired: tuple[str, ...]) -> list[str]:
    words = []
    largest = max((len(tile["tokens"]) for tile in atlas.tiles), default=0)
    if atlas.tiles and not detail.tile:
        words.append("the pieces of real maps")
    elif largest > detail.tile:
        words.append(f"tokens of the pieces of maps beyond the first {detail.tile}")
    words += [
        f"the {label(name)} of all pairs of heads"
        for name in Detail().pairs
        if name in atlas.pairs and name not in paired
    ]
    if atlas.spread and not detail.spread:
        words.append("standard errors")
    return words


def numbers(values: np.ndarray, digits: int) -> list[float | int | None]:
    """Rounded to significant digits; None for NaN and infinity."""
    return [_number(value, digits) for value in values.astype(np.float64).tolist()]


def _number(value: float, digits: int) -> float | int | None:
    """Rounded; whole numbers without a point; None for what JSON has no word for."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
