"""Tables of a search's page: what came out, every point, what was tried for a cache."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from headwise.compress.search.curve import Curve, summary

__all__ = ["outcome", "points", "tried"]

_COUNTED = {
    "params": ("params", "parameters", ""),
    "bytes": ("bytes", "bytes of the weights", "B"),
    "flops": ("flops", "operations of a forward pass", "FLOP"),
    "time": ("seconds", "seconds of a forward pass", "s"),
    "kv": ("kv", "bytes of the key-value cache, a token", "B"),
}
"""What is counted -> its name among the original's figures, in words, its unit."""
_TRIED = (
    "rise of the loss, nats",
    "bytes left",
    "tokens kept",
    "bits",
    "spread over layers",
    "which tokens stay",
)


def outcome(curve: Curve) -> str:
    """The original beside what came out, with units; what was asked for in bold."""
    best, whole = curve.best, curve.points[0].quality
    rows = []
    for name, share in best.left.items():
        key, words, unit = _COUNTED[name]
        known = curve.original.get(key)
        figures = ("", "") if known is None else (_short(known, unit), _short(known * share, unit))
        if name == "kv" and known is None:
            words = "bytes of the key-value cache"
        asked = f"; asked for: {curve.share:.1%} or less" if name == curve.what else ""
        kind = ' class="chosen"' if asked else ""
        rows.append(f"<tr{kind}>{_cells(words + asked, *figures, f'{share:.1%}')}</tr>")
    found = best.quality
    error = f" ± {found.loss_error:.3f}" if math.isfinite(found.loss_error) else ""
    change = f"{found.loss_change:+.3f}{error}"
    for cells in (
        ("loss, nats a token", f"{whole.loss:.3f}", f"{found.loss:.3f}", change),
        ("same next token as the original", "", f"{found.agreement:.1%}", ""),
        ("KL from the original, nats a token", "", number(found.kl), ""),
    ):
        rows.append(f"<tr>{_cells(*cells)}</tr>")
    head = "<th></th><th>original</th><th>now</th><th>left, or change</th>"
    return (
        f'<div class="wide"><table class="first"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def points(curve: Curve) -> str:
    """Every point that was measured."""
    names = ["point", *curve.table()[0][1:]]
    head = "".join(f"<th>{escape(name.replace('+/-', '±'))}</th>" for name in names)
    rows = []
    for place, point in enumerate(curve.points):
        quality = point.quality
        chosen = place == curve.chosen
        kind = ' class="chosen"' if chosen else "" if point.within else ' class="refused"'
        figures = [*point.left.values(), quality.loss, quality.loss_change, quality.loss_error,
                   quality.agreement, quality.kl]  # fmt: skip
        cells = "".join(f"<td>{number(value)}</td>" for value in figures)
        took = escape(summary(point.took)) or "the original"
        took += "" if point.within else " (refused)"
        rows.append(f"<tr{kind}><td>{place}{' *' * chosen}</td>{cells}<td>{took}</td></tr>")
    return (
        f'<div class="wide"><table class="last"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def tried(curve: Curve) -> str:
    """Of a search for a cache: everything that was tried at the bytes that were asked for."""
    known: dict[str, dict[str, Any]] = curve.about.get("tried") or {}
    if not known:
        return ""
    rows = []
    for one in sorted(known.values(), key=lambda one: one["loss"]):
        over = one["kv"] > curve.share * (1 + 1e-9)
        cells = (f"{one['loss']:+.3f}", f"{one['kv']:.1%}{' (over)' if over else ''}")
        kind = ' class="refused"' if over else ""
        rows.append(f"<tr{kind}>{_cells(*cells, *_setting(one['settings']))}</tr>")
    head = "".join(f"<th>{name}</th>" for name in _TRIED)
    return f"""<h2>What was tried at these bytes</h2>
<p class="muted">Best first, on the half of the text that choices are made on; the points above are
measured on the other half. Bits are those of a cached number ("as computed": not packed). Where
numbers take fewer bits, more tokens fit.</p>
<div class="wide"><table class="tried"><thead><tr>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>"""


def _setting(known: dict[str, Any]) -> tuple[str, str, str, str]:
    """(tokens kept, bits, how they are spread, which stay)"""
    bits = "as computed" if known["bits"] is None else str(known["bits"])
    layers = known["layers"] or [known["share"]]
    if min(layers) >= 1:
        return "all", bits, "-", "-"
    return f"{sum(layers) / len(layers):.0%}", bits, known["shape"], known["policy"]


def number(value: float) -> str:
    """Three places, or a dash."""
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _cells(words: str, *figures: str) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in (words, *figures))


def _short(value: float, unit: str) -> str:
    """1,869,504 as 1.87 M; without a unit, a billion is B."""
    if unit == "s":
        return f"{value:#.3g}".rstrip(".") + " s"
    for size, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.0f}{' ' * bool(unit)}{unit}"
