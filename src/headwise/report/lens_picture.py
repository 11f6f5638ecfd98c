"""What a lens saw as a picture: layers upwards, positions across, in each cell the likeliest token.

The stronger a cell's colour, the surer the layer; a frame marks the token that is right.
"""

from __future__ import annotations

from html import escape

from headwise.instruments import Lens
from headwise.report.picture import DARK, LIGHT, STYLE

__all__ = ["lens_picture"]

_WIDE, _HIGH, _LEFT, _TOP = 64, 24, 92, 64
_LETTERS = 8
_MORE = """
.hw-picture .word { fill: var(--hw-ink); text-anchor: middle; font-size: 11px; }
.hw-picture .name { text-anchor: end; }
.hw-picture .right { fill: none; stroke: var(--hw-1); stroke-width: 2; }
"""


def lens_picture(
    lens: Lens, example: int = 0, first: int = 0, count: int = 16, title: str = ""
) -> str:
    """One `<svg>` of `count` positions of an example, from `first`; light and dark.

    Raises LookupError for an example that is not there, ValueError where no position is left.
    """
    rows = lens.rows_of(example)[first : first + count]
    if not len(rows):
        raise ValueError(
            f"example {example} has {len(lens.rows_of(example))} positions: none from {first} on"
        )
    layers = len(lens.layers)
    width = _LEFT + _WIDE * len(rows) + 16
    bottom = _TOP + _HIGH * layers
    parts = [
        f'<text class="title" x="16" y="24">{escape(title or f"{lens.kind} lens")}</text>',
        f'<text class="name" x="{_LEFT - 8}" y="{_TOP - 8}">reads</text>',
        f'<text class="name" x="{_LEFT - 8}" y="{bottom + 17}">target</text>',
    ]
    for column, row in enumerate(rows):
        middle = _LEFT + _WIDE * (column + 0.5)
        for y, token in ((_TOP - 8, lens.token[row]), (bottom + 17, lens.target[row])):
            word = lens.word(token) if token >= 0 else "-"
            parts.append(f'<text class="word" x="{middle:g}" y="{y}">{_shown(word)}</text>')
    for layer, name in enumerate(lens.layers):
        y = bottom - _HIGH * (layer + 1)
        parts.append(f'<text class="name" x="{_LEFT - 8}" y="{y + 16}">{escape(name)}</text>')
        parts += [_cell(lens, layer, row, _LEFT + _WIDE * n, y) for n, row in enumerate(rows)]
    dark = f"@media (prefers-color-scheme: dark) {{ .hw-picture {{ {DARK} }} }}"
    style = f"<style>.hw-picture {{ {LIGHT} }} {dark} {STYLE} {_MORE}</style>"
    note = "colour: probability of the word; framed: it is the target"
    parts.append(f'<text x="16" y="{bottom + 42}">{note}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" class="hw-picture" role="img" '
        f'viewBox="0 0 {width} {bottom + 54}" width="{width}" height="{bottom + 54}" '
        f'aria-label="{escape(title or lens.kind + " lens")}">{style}'
        f'<rect width="100%" height="100%" fill="var(--hw-paper)"/>{"".join(parts)}</svg>\n'
    )


def _cell(lens: Lens, layer: int, row: int, x: float, y: float) -> str:
    token, sure = lens.top[layer, row, 0], float(lens.top_probability[layer, row, 0])
    rank = int(lens.rank[layer, row])
    word = lens.word(token)
    told = f"{word!r}: {sure:.3f}; entropy {lens.entropy[layer, row]:.2f} nats"
    if rank >= 0:
        told += f"; target {lens.word(lens.target[row])!r}: rank {rank}"
    box = f'x="{x + 1:g}" y="{y + 1:g}" width="{_WIDE - 2}" height="{_HIGH - 2}"'
    # at full strength the word on top could not be read
    parts = [f'<rect class="cells" {box} fill-opacity="{0.04 + 0.46 * sure:.3f}"/>']
    if rank == 0:
        parts.append(f'<rect class="right" {box}/>')
    parts.append(f'<text class="word" x="{x + _WIDE / 2:g}" y="{y + 16:g}">{_shown(word)}</text>')
    return f"<g><title>{escape(told)}</title>{''.join(parts)}</g>"


def _shown(word: str) -> str:
    plain = word.replace("\n", "↵").replace("\t", "⇥")
    plain = "".join(c if c.isprintable() else "·" for c in plain)
    cut = plain if len(plain) <= _LETTERS else plain[: _LETTERS - 1] + "…"
    return escape(cut.replace(" ", "·") if not cut.strip() else cut)
