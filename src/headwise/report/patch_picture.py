"""What patching found as a picture: layers upwards, positions or heads across."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from headwise.instruments.patch_table import PatchTable
from headwise.report.frame import framed

__all__ = ["patch_picture"]

_LEFT, _TOP, _HIGH = 76, 56, 22
_LETTERS = 14
_MORE = """
.hw-picture .label { font-size: 11px; }
.hw-picture .end { text-anchor: end; }
.hw-picture .middle { text-anchor: middle; }
.hw-picture .value { fill: var(--hw-ink); text-anchor: middle; font-size: 10px; }
.hw-picture .dot { fill: var(--hw-ink); }
"""


def patch_picture(table: PatchTable, title: str = "", labels: Sequence[str] | None = None) -> str:
    """One `<svg>`, light and dark. A cell is as strong as what its patch brings about: the share
    of the gap between the runs that it closes (denoising), or opens (noising).

    labels: what stands below the columns instead of the table's own, such as the tokens. Of a
    table layer x head x position, the position that matters most is drawn. What is below zero is
    dotted and of another colour; at most 1 (or the largest share) is full strength.

    Raises ValueError where nothing can be drawn: both runs equally good, or other labels than
    columns.
    """
    rows, names, columns, across = _flat(table)
    if labels is not None:
        if len(labels) != len(columns):
            raise ValueError(f"{len(labels)} labels for {len(columns)} columns")
        columns = tuple(labels)
    finite = rows[np.isfinite(rows)]
    if not finite.size:
        raise ValueError("clean and corrupted runs are equally good: no share can be drawn")
    most = max(1.0, float(np.abs(finite).max()))
    wide = min(56.0, max(18.0, 640 / len(columns)))
    depth, slanted = len(names), any(len(c) * 6.9 > wide for c in columns)
    bottom = _TOP + _HIGH * depth
    parts = []
    for number, name in enumerate(names):
        y = bottom - _HIGH * (number + 1)
        parts.append(
            f'<text class="label end" x="{_LEFT - 8}" y="{y + 15:g}">L{escape(name)}</text>'
        )
        for column in range(len(columns)):
            told = f"{table.site} of layer {name}, {across} {columns[column]}"
            x = _LEFT + wide * column
            parts.append(_cell(float(rows[number, column]), most, x, y, wide, told))
    for column, name in enumerate(columns):
        x = _LEFT + wide * (column + 0.5)
        parts.append(_below(name, x, bottom, slanted))
    right = _LEFT + wide * len(columns)
    parts.append(
        f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{right - _LEFT:g}" '
        f'height="{bottom - _TOP}"/>'
    )
    low = bottom + (14 + 6 * min(_LETTERS, max(map(len, columns))) if slanted else 24)
    verb = "closes" if table.direction == "denoise" else "opens"
    sign = "; dotted: below zero" if float(finite.min()) < -most / 100 else ""
    notes = (
        f"up: layers of the {table.site}; across: {across}s",
        f"share of the gap in {table.metric} ({table.corrupted.mean():.2f} corrupted, "
        f"{table.clean.mean():.2f} clean)",
        f"that a patch {verb}; full strength: {most:.2f}{sign}",
    )
    parts += [
        f'<text class="label" x="16" y="{low + 18 * (i + 1):g}">{escape(note)}</text>'
        for i, note in enumerate(notes)
    ]
    head = title or f"Patching the {table.site}"
    width = max(right + 24, 24 + 7.5 * len(head), 24 + 6.2 * max(map(len, notes)))
    return framed("".join(parts), head, width, low + 72, _MORE)


def _flat(table: PatchTable) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...], str]:
    """Rows of shares, names of rows and columns, and what the columns are."""
    shares = table.normalised if table.direction == "denoise" else 1 - table.normalised
    axes = dict(table.axes)
    names = next(iter(axes.values()))
    if shares.ndim == 1:
        return shares[:, None], names, ("all",), "position"
    if shares.ndim == 3:
        place = int(np.nanargmax(np.nanmax(np.abs(shares), axis=(0, 1))))
        label = axes["position"][place]
        return shares[:, :, place], names, axes["head"], f"head at position {label}, head"
    return shares, names, list(axes.values())[1], list(axes)[1]


def _cell(value: float, most: float, x: float, y: float, wide: float, told: str) -> str:
    box = f'x="{x:.1f}" y="{y:g}" width="{wide:.1f}" height="{_HIGH}"'
    if not np.isfinite(value):
        return f'<rect class="none" {box}><title>{escape(told)}: none</title></rect>'
    strength = abs(value) / most
    kind = "below" if value < 0 else "cells"
    # at full strength a number on top could not be read
    shade = 0.06 + 0.49 * strength if strength > 0.005 else 0.0
    shown = f'<rect class="{kind}" {box} fill-opacity="{shade:.3f}"/>'
    middle = x + wide / 2
    if wide >= 30 and strength >= 0.1:
        shown += f'<text class="value" x="{middle:.1f}" y="{y + 15:g}">{value:.2f}</text>'
    elif value < 0 and strength >= 0.02:
        shown += f'<circle class="dot" cx="{middle:.1f}" cy="{y + _HIGH / 2:g}" r="1.4"/>'
    return f"<g><title>{escape(told)}: {value:.3f}</title>{shown}</g>"


def _below(name: str, x: float, bottom: float, slanted: bool) -> str:
    cut = name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…"
    plain = "".join(c if c.isprintable() else "·" for c in cut.replace("\n", "↵"))
    if slanted:
        turn = f'transform="rotate(-60 {x + 4:.1f} {bottom + 12})"'
        at = f'x="{x + 4:.1f}" y="{bottom + 12}"'
        return f'<text class="label end" {at} {turn}>{escape(plain)}</text>'
    return f'<text class="label middle" x="{x:.1f}" y="{bottom + 16}">{escape(plain)}</text>'
