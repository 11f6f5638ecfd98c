"""A Comparison as plain text for a terminal."""

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from headwise.instruments.compare import BETWEEN_HEADS, STANDARD_ERRORS

if TYPE_CHECKING:
    from headwise.instruments.compare import Comparison

__all__ = ["as_text"]

_MOST_NAMED = 20


def as_text(comparison: "Comparison", n: int) -> str:
    """Warnings first, then kinds, columns and the n largest changes in each unit."""
    a, b = comparison.models
    parts = [f"a = {a}\nb = {b}\n{len(comparison)} heads in both"]
    parts.append(_lines("!", comparison.warnings))
    parts.append(_lines("-", _left_out(comparison)))
    parts.append(_kinds(comparison))
    parts.append(_columns(comparison))
    parts += [_largest(comparison, n, unit) for unit in (STANDARD_ERRORS, BETWEEN_HEADS)]
    return "\n\n".join(part for part in parts if part)


def _left_out(comparison: "Comparison") -> list[str]:
    left = []
    for which, heads, columns in (
        ("a", comparison.only_a, comparison.columns_only_a),
        ("b", comparison.only_b, comparison.columns_only_b),
    ):
        if heads:
            left.append(f"{len(heads)} heads only in {which}: {_some(heads)}")
        if columns:
            left.append(f"columns only in {which}: {', '.join(columns)}")
    return left


def _kinds(comparison: "Comparison") -> str:
    if comparison.kinds is None:
        return ""
    changed = comparison.changed_kinds()
    if not changed:
        return "No head changed its kind."
    ways = Counter((before, after) for _, before, after in changed)
    lines = [f"{len(changed)} heads changed their kind:"]
    for (before, after), count in ways.most_common():
        heads = [head for head, *way in changed if tuple(way) == (before, after)]
        lines.append(f"  {before} -> {after}: {count} ({_some(heads)})")
    return "\n".join(lines)


def _columns(comparison: "Comparison") -> str:
    rows = []
    for name, change in comparison.difference.items():
        known = change[np.isfinite(change)]
        if not len(known):
            rows.append([name, "0", "", "", "", "", ""])
            continue
        finite = np.isfinite(change)
        largest = int(np.nanargmax(np.where(finite, np.abs(change), -1.0)))
        rows.append([
            name, str(len(known)),
            _number(comparison.a[name][finite].mean()), _number(comparison.b[name][finite].mean()),
            _number(known.mean(), signed=True), _number(np.abs(known).mean()),
            f"{_number(change[largest], signed=True)} at {comparison.names[largest]}"
            if change[largest] else "none",
        ])  # fmt: skip
    titles = ["column", "heads", "mean a", "mean b", "mean change", "mean |change|", "largest"]
    return "Columns, over the heads measured in both:\n" + _table(titles, rows)


def _largest(comparison: "Comparison", n: int, unit: str) -> str:
    changes = comparison.largest(n, unit=unit)
    if not changes:
        return ""
    rows = [
        [c.head, c.column, _number(c.a), _number(c.b), _number(c.difference, signed=True),
         f"{c.size:.1f}"]
        for c in changes
    ]  # fmt: skip
    titles = ["head", "column", "a", "b", "change", "size"]
    return f"Largest changes, size in {unit}:\n" + _table(titles, rows)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    # words to the left, numbers to the right
    words = [title in ("head", "column", "largest") for title in titles]
    lines = []
    for row in (titles, *rows):
        cells = zip(row, widths, words, strict=True)
        line = "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in cells)
        lines.append(f"  {line}".rstrip())
    return "\n".join(lines)


def _number(value: float, signed: bool = False) -> str:
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    digits = 3 if size < 10 else 1
    form = f"{'+' if signed else ''}.{digits}f" if 0.001 <= size < 1e5 or not size else ".2e"
    return f"{value:{form}}"


def _lines(sign: str, words: list[str]) -> str:
    return "\n".join(f"{sign} {line}" for line in words)


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
