"""Plain text tables, and the few lines that say what an atlas found."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from headwise.instruments import Atlas
from headwise.instruments.kinds import KINDS, RULES

# The column that decides a kind ranks the heads of that kind.
_RANKED_BY = {rule.kind: rule.conditions[0].column for rule in reversed(RULES)}


def number(value: Any) -> str:
    """A cell: three decimals, fewer of what is large, a dash for what was not measured."""
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        if abs(value) >= 10_000:
            return f"{value:.2e}"
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def table(names: Sequence[str], rows: Sequence[Sequence[Any]], indent: int = 0) -> str:
    """Columns wide enough for what they hold; numbers to the right, words to the left."""
    cells = [[number(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(names))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [list(names), ["-" * width for width in widths], *cells]
    ]
    return textwrap.indent("\n".join(lines), " " * indent)


def kinds_found(atlas: Atlas, examples: int = 4) -> str:
    """A line a kind: how many heads, and those in which it shows most."""
    if "kind" not in atlas.heads:
        return "no kinds: the instruments that decide them were not asked for"
    counts = Counter(atlas.heads["kind"].tolist())
    rows = []
    for kind in [*KINDS, *sorted(set(counts) - set(KINDS))]:
        if not counts[kind]:
            continue
        column = _RANKED_BY.get(kind)
        best = ""
        if column is not None and column in atlas.heads:
            values = atlas.heads[column]
            of_kind = [row for row in range(len(atlas)) if atlas.heads["kind"][row] == kind]
            of_kind = [row for row in of_kind if not math.isnan(values[row])]
            of_kind.sort(key=lambda row: -values[row])
            best = "  ".join(f"{atlas.name(row)} {values[row]:.2f}" for row in of_kind[:examples])
        rows.append((kind, counts[kind], f"{counts[kind] / len(atlas):.0%}", column or "", best))
    return table(("kind", "heads", "share", "by", "strongest"), rows)


def measured_on(atlas: Atlas) -> str:
    """One line: model, heads, inputs, time, memory."""
    known = atlas.provenance
    texts = known.get("texts") or []
    tokens = sum(text.get("tokens") or 0 for text in texts)
    parts = [f"{known.get('model') or 'model'}: {len(atlas)} heads"]
    if tokens:
        parts.append(f"{tokens:,} tokens in {len(texts)} text{'s' * (len(texts) != 1)}")
    if isinstance(known.get("seconds"), int | float):
        parts.append(f"{known['seconds']:.1f} s")
    if isinstance(known.get("peak_memory_bytes"), int | float):
        parts.append(f"peak memory {known['peak_memory_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(parts)
