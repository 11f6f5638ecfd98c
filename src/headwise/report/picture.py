"""A paper's `Picture` as SVG: light and dark, and readable without its colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from headwise.papers import Picture
from headwise.report.heatmaps import heatmaps
from headwise.report.ticks import Axis, axis, written

STYLE = """
.hw-picture { font: 12px system-ui, sans-serif; }
.hw-picture text { fill: var(--hw-muted); }
.hw-picture .title { fill: var(--hw-ink); font-weight: 600; font-size: 14px; }
.hw-picture .grid { stroke: var(--hw-line); }
.hw-picture .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.hw-picture .cells { fill: var(--hw-0); } .hw-picture .below { fill: var(--hw-1); }
.hw-picture .frame { fill: none; stroke: var(--hw-line); }
.hw-picture .none { fill: var(--hw-line); }
"""
LIGHT = (
    "--hw-ink: #1d2430; --hw-muted: #4d5866; --hw-line: #d7dce3; --hw-paper: #ffffff; "
    "--hw-0: #0a61b5; --hw-1: #b3450e; --hw-2: #1b7a4b; --hw-3: #8a3fa0; --hw-4: #7a6200; "
    "--hw-5: #4d5866;"
)
DARK = (
    "--hw-ink: #eef1f5; --hw-muted: #b3bdc9; --hw-line: #3a4453; --hw-paper: #161b22; "
    "--hw-0: #6db3f8; --hw-1: #f59a68; --hw-2: #62cf98; --hw-3: #d79bea; --hw-4: #dcc25a; "
    "--hw-5: #b3bdc9;"
)
WIDTH, HEIGHT = 720, 380
LEFT, TOP, BOTTOM = 64, 44, 50
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 4")
COLOURS = 6
LABEL = 28  # letters


def svg(picture: Picture, standalone: bool = True) -> str:
    """The picture as one `<svg>`. `standalone`: with its colours, for light and for dark; else
    they come from the page around it, as the variables of `LIGHT` and `DARK`.

    Values that are not finite are left out. Raises ValueError where none is left.
    """
    body, height = _lines(picture) if picture.lines else heatmaps(picture, WIDTH, TOP)
    style = ground = ""
    if standalone:
        dark = f"@media (prefers-color-scheme: dark) {{ .hw-picture {{ {DARK} }} }}"
        style = f"<style>.hw-picture {{ {LIGHT} }} {dark} {STYLE}</style>"
        ground = '<rect width="100%" height="100%" fill="var(--hw-paper)"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hw-picture" role="img" '
        f'viewBox="0 0 {WIDTH} {height:g}" aria-label="{escape(picture.title)}">{style}{ground}'
        f'<text class="title" x="16" y="24">{escape(picture.title)}</text>{body}</svg>\n'
    )


def _lines(picture: Picture) -> tuple[str, float]:
    drawn = {name: _finite(*both) for name, both in picture.lines.items()}
    xs = axis([x for points in drawn.values() for x, _ in points], "x" in picture.log)
    ys = axis([y for points in drawn.values() for _, y in points], "y" in picture.log)
    right = 20 + 7.6 * min(LABEL, max(map(len, drawn)))
    left = max(LEFT, 30 + 7.2 * max(len(written(tick)) for tick in ys.ticks))
    width, height = WIDTH - left - right, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * xs.at(x), TOP + height * (1 - ys.at(y))

    parts = [_axes(picture, xs, ys, left, width, height)]
    ends = []
    for number, (name, points) in enumerate(drawn.items()):
        if not points:
            continue
        places = [place(x, y) for x, y in points]
        colour = f"var(--hw-{number % COLOURS})"
        path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
        dash = DASHES[number % len(DASHES)]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path class="line" d="{path}" stroke="{colour}"{dashed}/>')
        every = max(1, len(places) // 12)
        parts += [_marker(number, x, y, colour) for x, y in places[::every]]
        ends.append((places[-1][1], name, colour, places[-1][0]))
    parts += _labels(ends, left + width + 10)
    return "".join(parts), HEIGHT


def _finite(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    points = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _axes(picture: Picture, xs: Axis, ys: Axis, left: float, width: float, height: float) -> str:
    parts = []
    for tick in ys.ticks:
        y = TOP + height * (1 - ys.at(tick))
        parts.append(f'<path class="grid" d="M{left:g} {y:.1f}h{width:g}"/>')
        parts.append(
            f'<text x="{left - 8:g}" y="{y + 4:.1f}" text-anchor="end">{written(tick)}</text>'
        )
    for tick in xs.ticks:
        x = left + width * xs.at(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP + height:g}v5"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{TOP + height + 20:g}" text-anchor="middle">'
            f"{written(tick)}</text>"
        )
    parts.append(
        f'<text x="{left + width / 2:g}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{escape(picture.x)}</text>"
    )
    middle = TOP + height / 2
    parts.append(
        f'<text x="14" y="{middle:g}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle:g})">{escape(picture.y)}</text>'
    )
    return "".join(parts)


def _marker(number: int, x: float, y: float, colour: str) -> str:
    """A shape of its own for each line: disc, square, triangle, diamond, cross, ring."""
    shape = number % 6
    if shape in (0, 5):
        fill = "var(--hw-paper)" if shape else colour
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="{colour}"/>'
    drawn = (
        "M-3.2 -3.2h6.4v6.4h-6.4z",
        "M0 -4.2L4 3.2H-4z",
        "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
        "M-3.5 -3.5L3.5 3.5M-3.5 3.5L3.5 -3.5",
    )[shape - 1]
    return (
        f'<path d="{drawn}" transform="translate({x:.1f} {y:.1f})" fill="{colour}" '
        f'stroke="{colour}" stroke-width="1.5"/>'
    )


def _labels(ends: list[tuple[float, str, str, float]], at: float, apart: float = 15) -> list[str]:
    """The name of each line where it ends, moved apart where they would touch."""
    placed: list[float] = []
    ordered = sorted(ends)
    for y, *_ in ordered:
        placed.append(max(y, placed[-1] + apart) if placed else y)
    over = placed[-1] - (HEIGHT - BOTTOM) if placed else 0
    if over > 0:
        for i in reversed(range(len(placed))):
            ceiling = placed[i + 1] - apart if i + 1 < len(placed) else HEIGHT - BOTTOM
            placed[i] = min(placed[i], ceiling)
    return [
        f'<path class="grid" d="M{x + 4:.1f} {y:.1f}L{at - 3:.1f} {to:.1f}"/>'
        f'<text x="{at:g}" y="{to + 4:.1f}" style="fill: {colour}; font-weight: 600">'
        f"{escape(name if len(name) <= LABEL else name[: LABEL - 1] + '…')}</text>"
        for (y, name, colour, x), to in zip(ordered, placed, strict=True)
    ]
