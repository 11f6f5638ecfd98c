"""How many heads and channels of every layer a search has left."""

from __future__ import annotations

from typing import Any

from headwise.compress.search.curve import Curve

__all__ = ["remains_picture"]

_WIDTH, _LEFT, _ROW, _TOP = 720, 70, 22, 52
_BAR = 270


def remains_picture(curve: Curve) -> str:
    """One `<svg>`: a row a layer, two bars, what is gone as an outline; empty where the search has
    taken nothing out of layers. Its colours come from the page around it."""
    layers: list[dict[str, Any]] = curve.about.get("layers") or []
    if not any("heads_left" in row for row in layers):
        return ""
    height = _TOP + _ROW * len(layers) + 16
    parts = [
        '<text class="title" x="16" y="24">Left of every layer of the original</text>',
        f'<text x="{_LEFT}" y="{_TOP - 8}">heads</text>',
        f'<text x="{_LEFT + _BAR + 40}" y="{_TOP - 8}">channels</text>',
    ]
    for number, row in enumerate(layers):
        y = _TOP + _ROW * number
        parts.append(
            f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">L{row["layer"]}</text>'
        )
        for place, name in ((0, "heads"), (1, "channels")):
            parts.append(_bar(_LEFT + place * (_BAR + 40), y, row[f"{name}_left"], row[name]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hw-picture" role="img" '
        f'viewBox="0 0 {_WIDTH} {height}" aria-label="heads and channels left of every layer">'
        f"{''.join(parts)}</svg>\n"
    )


def _bar(x: int, y: int, left: int, whole: int) -> str:
    if not whole:
        return ""
    width = _BAR - 64
    filled = width * left / whole
    return (
        f'<rect class="cells" x="{x}" y="{y + 3}" width="{filled:.1f}" height="12"/>'
        f'<rect class="frame" x="{x}" y="{y + 3}" width="{width}" height="12"/>'
        f'<text x="{x + width + 8}" y="{y + 13}">{left} of {whole}</text>'
    )
