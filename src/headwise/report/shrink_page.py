"""The page of a search: the curve, what is left of every layer, every point in a table."""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path
from typing import Any

from headwise import __version__
from headwise.compress.search.curve import Curve, summary
from headwise.compress.search.targets import KEEP
from headwise.models.atomic import write_atomically
from headwise.papers import Picture
from headwise.report.picture import DARK, LIGHT, STYLE, svg
from headwise.report.remains_picture import remains_picture

__all__ = ["curve_pictures", "write_shrink"]

_PAGE = """
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem; color: var(--hw-ink);
  background: var(--hw-paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; } .muted, caption { color: var(--hw-muted); }
svg { width: 100%; height: auto; border: 1px solid var(--hw-line); border-radius: 6px;
  margin: .5rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--hw-line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:last-child, td:last-child { text-align: left; white-space: normal; min-width: 14rem; }
tr.chosen { font-weight: 600; } tr.refused { color: var(--hw-muted); }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def write_shrink(
    curve: Curve, path: str | os.PathLike[str], title: str, command: str | None = None
) -> Path:
    """Write the page as one HTML file that needs nothing else, all of it or nothing."""
    place = Path(path)
    write_atomically(place, _page(curve, title, command).encode("utf-8"))
    return place


def curve_pictures(curve: Curve) -> list[Picture]:
    """Loss, then agreement with the original, over the share that is left."""
    kept = [point for point in curve.points if point.within]
    refused = [point for point in curve.points if not point.within]
    words = f"{KEEP[curve.what]}, share of the original"
    pictures = []
    for name, said in (("loss_change", "rise of the loss, nats"),
                       ("agreement", "share of equal next tokens")):  # fmt: skip
        lines: dict[str, Any] = {}
        for label, points in (("taken", kept), ("refused", refused)):
            if points:
                order = sorted(points, key=lambda point: point.left[curve.what])
                lines[label] = (
                    [point.left[curve.what] for point in order],
                    [getattr(point.quality, name) for point in order],
                )
        heading = {"loss_change": "What it costs", "agreement": "How often it goes on the same"}
        pictures.append(Picture(heading[name], words, said, lines))
    return pictures


def _page(curve: Curve, title: str, command: str | None) -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}"
    style = f":root {{ color-scheme: light dark; {LIGHT} }} {dark} {STYLE} {_PAGE}"
    drawn = "".join(svg(picture, standalone=False) for picture in curve_pictures(curve))
    remains = remains_picture(curve)
    layers = f"<h2>What is left of every layer</h2>{remains}" if remains else ""
    clock = "Time is one forward pass, measured beside the original in turns."
    clock = clock if "time" in curve.points[0].left else ""
    told = f"<p>Made by <code>{escape(command)}</code></p>" if command else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}, smaller</title><style>{style}</style></head><body>
<p class="muted">headwise {escape(__version__)}, shrink</p>
<h1>{escape(title)}</h1>
<p>{escape(sentence(curve))}</p>
{drawn}{layers}
<h2>Every point</h2>
<p class="muted">Shares are of the original. The chosen point is marked *, refused ones are beyond
the bound on quality. Quality is measured on text that nothing was fitted to; +/- is the standard
error over its windows. {clock}</p>
<div class="wide">{_table(curve)}</div>
{_tried(curve)}{told}</body></html>
"""


def sentence(curve: Curve) -> str:
    """What came out, in one or two sentences."""
    best, asked = curve.best, f"{curve.what}={curve.share:g}"
    quality = best.quality
    error = f" +/- {quality.loss_error:.3f}" if math.isfinite(quality.loss_error) else ""
    words = (
        f"{'Reached' if curve.met else 'Asked for'} {asked}: {curve.what}="
        f"{best.left[curve.what]:.3f} at a loss of {quality.loss:.3f} nats "
        f"({quality.loss_change:+.3f}{error}); it goes on like the original at "
        f"{quality.agreement:.0%} of the positions."
    )
    if not curve.met:
        words += f" The search ended before: {curve.about.get('done', 'interrupted')}."
    return words


def _table(curve: Curve) -> str:
    names, _ = curve.table()
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for number, point in enumerate(curve.points):
        quality = point.quality
        chosen = number == curve.chosen
        kind = ' class="chosen"' if chosen else "" if point.within else ' class="refused"'
        figures = [*point.left.values(), quality.loss, quality.loss_change, quality.loss_error,
                   quality.agreement, quality.kl]  # fmt: skip
        cells = "".join(f"<td>{_number(value)}</td>" for value in figures)
        took = escape(summary(point.took)) or "the original"
        took += "" if point.within else " (refused)"
        rows.append(f"<tr{kind}><td>{number}{' *' * chosen}</td>{cells}<td>{took}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _tried(curve: Curve) -> str:
    """Of a search for a cache: everything that was tried at the bytes that were asked for."""
    tried: dict[str, dict[str, Any]] = curve.about.get("tried") or {}
    if not tried:
        return ""
    rows = "".join(
        f"<tr><td>{_number(one['kv'])}</td><td>{_number(one['loss'])}</td>"
        f"<td>{escape(name)}</td></tr>"
        for name, one in sorted(tried.items(), key=lambda item: item[1]["loss"])
    )
    return f"""<h2>What was tried at these bytes</h2>
<p class="muted">On the half of the text that choices are made on. Tokens are as first asked for;
where positions, scales or notes took the cache over the bytes, fewer were kept.</p>
<div class="wide"><table>
<thead><tr><th>kv</th><th>rise of the loss</th><th>settings</th></tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
