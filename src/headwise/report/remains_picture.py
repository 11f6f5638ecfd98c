"""What a search has left of every layer: heads and channels, or tokens of the cache."""

from __future__ import annotations

from typing import Any

from headwise.compress.search.curve import Curve

__all__ = ["remains_picture"]

_WIDTH, _LEFT, _ROW, _TOP = 480, 44, 22, 34
_BAR, _APART = 104, 216


def remains_picture(curve: Curve) -> str:
    """One `<svg>`: a row a layer, bars of what is left, what is gone as an outline; empty where
    all layers are as they were. Its colours come from the page around it."""
    layers: list[dict[str, Any]] = curve.about.get("layers") or []
    shares: list[float] = (curve.cache or {}).get("layers") or []
    if any("heads_left" in row for row in layers):
        names = ["heads", "channels"]
        rows = [
            (row["layer"], [_of(row[f"{name}_left"], row[name]) for name in names])
            for row in layers
        ]
    elif shares:
        names = ["share of the tokens seen that the cache keeps"]
        rows = [(n, [(share, f"{share:.2f}")]) for n, share in enumerate(shares)]
    else:
        return ""
    height = _TOP + _ROW * len(rows) + 12
    parts = [
        f'<text x="{_LEFT + _APART * place}" y="{_TOP - 10}">{name}</text>'
        for place, name in enumerate(names)
    ]
    for number, (layer, bars) in enumerate(rows):
        y = _TOP + _ROW * number
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">L{layer}</text>')
        for place, (share, words) in enumerate(bars):
            parts.append(_bar(_LEFT + _APART * place, y, share, words))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hw-picture" role="img" '
        f'viewBox="0 0 {_WIDTH} {height}" aria-label="left of every layer: {" and ".join(names)}">'
        f"{''.join(parts)}</svg>\n"
    )


def _of(left: int, whole: int) -> tuple[float, str]:
    return (left / whole, f"{left:,} of {whole:,}") if whole else (0.0, "")


def _bar(x: int, y: int, share: float, words: str) -> str:
    if not words:
        return ""
    return (
        f'<rect class="cells" x="{x}" y="{y + 3}" width="{_BAR * share:.1f}" height="12"/>'
        f'<rect class="frame" x="{x}" y="{y + 3}" width="{_BAR}" height="12"/>'
        f'<text x="{x + _BAR + 8}" y="{y + 13}">{words}</text>'
    )
