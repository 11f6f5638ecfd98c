"""The page of a search: the curve, what is left of every layer, every point in a table."""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path

from headwise import __version__
from headwise.compress.search.curve import Curve
from headwise.models.atomic import write_atomically
from headwise.report.curve_picture import curve_picture
from headwise.report.picture import DARK, LIGHT, STYLE
from headwise.report.remains_picture import remains_picture
from headwise.report.shrink_tables import outcome, points, tried

__all__ = ["sentence", "write_shrink"]

_PAGE = """
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem; color: var(--hw-ink);
  background: var(--hw-paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; } .muted, caption { color: var(--hw-muted); }
svg { width: 100%; max-width: 34rem; height: auto; border: 1px solid var(--hw-line);
  border-radius: 6px; box-sizing: border-box; }
.pair { display: grid; gap: .75rem; margin: 1.5rem 0 .5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.hw-picture .line { fill: none; } .hw-picture .taken { fill: var(--hw-0); }
.hw-picture .chosen { fill: none; stroke: var(--hw-ink); stroke-width: 1.5; }
.hw-picture .refused { stroke: var(--hw-1); stroke-width: 2; }
.hw-picture .bar { stroke: var(--hw-0); }
.hw-picture .asked { stroke: var(--hw-ink); stroke-dasharray: 6 4; }
.hw-picture .bound { stroke: var(--hw-1); stroke-width: 1.5; stroke-dasharray: 2 3; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--hw-line);
  white-space: nowrap; font-variant-numeric: tabular-nums; vertical-align: baseline; }
.first :is(th, td):first-child { text-align: left; white-space: normal; padding-left: 0;
  min-width: 7.5rem; }
.first :is(th, td) { padding-inline: .6rem 0; } .first th { white-space: normal; }
.tried :is(th, td):nth-child(n + 5) { text-align: left; }
.last :is(th, td):last-child { text-align: left; white-space: normal; min-width: 14rem; }
tr.chosen { font-weight: 600; } tr.refused { color: var(--hw-muted); }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""


_COUNTED = {
    "params": "params, the parameters",
    "bytes": "bytes, of the weights",
    "flops": "flops, operations of a forward pass",
    "time": "time, of one forward pass, measured beside the original in turns",
    "kv": "kv, the bytes of the key-value cache",
}


def write_shrink(
    curve: Curve, path: str | os.PathLike[str], title: str, command: str | None = None
) -> Path:
    """Write the page as one HTML file that needs nothing else, all of it or nothing."""
    place = Path(path)
    write_atomically(place, _page(curve, title, command).encode("utf-8"))
    return place


def _page(curve: Curve, title: str, command: str | None) -> str:
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}"
    style = f":root {{ color-scheme: light dark; {LIGHT} }} {dark} {STYLE} {_PAGE}"
    # a point alone is no curve
    names = ("loss_change", "agreement") if len(curve.points) > 1 else ()
    drawn = "".join(curve_picture(curve, name) for name in names)
    remains = remains_picture(curve)
    layers = f"<h2>What is left of every layer</h2>{remains}" if remains else ""
    counted = "; ".join(_COUNTED[name] for name in curve.points[0].left)
    refused = not all(point.within for point in curve.points)
    beyond = " Refused points are beyond the bound on quality." if refused else ""
    told = f"<p>Made by <code>{escape(command)}</code></p>" if command else ""
    windows = curve.best.quality.windows
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}, smaller</title><style>{style}</style></head><body>
<p class="muted">headwise {escape(__version__)}, shrink</p>
<h1>{escape(title)}, smaller</h1>
<p>{escape(sentence(curve))}</p>
{outcome(curve)}
<div class="pair">{drawn}</div>
<p class="muted">Quality is measured on text that nothing was fitted to ({windows} windows); ± and
bars are one standard error of the change over these windows.{beyond}</p>
{layers}
<h2>Every point</h2>
<p class="muted">Shares that are left of the original: {counted}. Then the loss in nats a token, its
change from the original with its standard error (±), agreement, the share of positions with the
same next token, and kl, KL(original || this) in nats a token. * is the chosen point.</p>
{points(curve)}
{tried(curve)}{told}</body></html>
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
