"""The curve of a search: what it costs over what is left, with the budget and the bound."""

from __future__ import annotations

import math
from html import escape

from headwise.compress.search.curve import Curve, Point
from headwise.compress.search.targets import KEEP, Limit
from headwise.report.ticks import Axis, axis, written

__all__ = ["curve_picture"]

_WIDTH, _HEIGHT, _TOP, _BOTTOM, _RIGHT = 480, 330, 64, 50, 18
_TITLES = {
    "loss_change": ("What it costs", "rise of the loss, nats a token"),
    "agreement": ("How often it goes on the same", "share of equal next tokens"),
}
_LINE = "M0 -4h16"


def curve_picture(curve: Curve, name: str) -> str:
    """One `<svg>` of "loss_change" or "agreement"; its colours come from the page around it.

    Taken points are joined; refused ones are crosses, the chosen one has a ring. Bars are one
    standard error of the loss up and down. Dashed upright: what was asked for; dotted: the bound.
    """
    title, said = _TITLES[name]
    values = {n: _value(point, name) for n, point in enumerate(curve.points)}
    values = {n: value for n, value in values.items() if math.isfinite(value)}
    bars = {n: _error(curve.points[n], name) for n in values}
    bound = _bound(curve, name)
    heights = [y + side * bars[n] for n, y in values.items() for side in (-1, 1)]
    xs = axis([*(curve.points[n].left[curve.what] for n in values), curve.share], False, 5)
    ys = axis([*heights, *([] if bound is None else [bound])], False)
    left = max(52, 30 + 7.2 * max(len(written(tick)) for tick in ys.ticks))
    width, height = _WIDTH - left - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * xs.at(x), _TOP + height * (1 - ys.at(y))

    places = {n: place(curve.points[n].left[curve.what], y) for n, y in values.items()}
    parts = [
        f'<text class="title" x="16" y="24">{title}</text>',
        _axes(xs, ys, left, width, height, f"{KEEP[curve.what]}, share of the original", said),
    ]
    x, y = place(curve.share, ys.low)
    parts.append(f'<path class="asked" d="M{x:.1f} {y:.1f}V{_TOP}"/>')
    if bound is not None:
        _, y = place(xs.low, bound)
        parts.append(f'<path class="bound" d="M{left:g} {y:.1f}h{width:g}"/>')
    for n, (x, y) in places.items():
        if bars[n]:
            tall = height * bars[n] / (ys.high - ys.low)
            parts.append(f'<path class="bar" d="M{x:.1f} {y - tall:.1f}v{2 * tall:.1f}"/>')
    kept = sorted((n for n in places if curve.points[n].within), key=lambda n: places[n][0])
    steps = " ".join(
        f"{'L' if i else 'M'}{places[n][0]:.1f} {places[n][1]:.1f}" for i, n in enumerate(kept)
    )
    if steps:
        parts.append(f'<path class="line" d="{steps}" stroke="var(--hw-0)"/>')
    for n, (x, y) in places.items():
        chosen = n == curve.chosen
        parts.append(_mark("chosen" if chosen else _kind(curve.points[n]), x, y))
    parts.append(_legend(curve, bound, sum(map(bool, bars.values())) > 0))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hw-picture" role="img" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{title}: {escape(said)}">'
        f"{''.join(parts)}</svg>\n"
    )


def _value(point: Point, name: str) -> float:
    return point.quality.loss_change if name == "loss_change" else point.quality.agreement


def _error(point: Point, name: str) -> float:
    error = point.quality.loss_error if name == "loss_change" else 0.0
    return error if math.isfinite(error) else 0.0


def _bound(curve: Curve, name: str) -> float | None:
    """Where the bound on quality that was asked for stands in this picture, if it is of it."""
    given = (curve.about.get("asked") or {}).get("quality")
    limit = None if given is None else Limit.read(given)
    if limit is None or limit.what != ("loss" if name == "loss_change" else "agreement"):
        return None
    whole = curve.points[0].quality.loss
    return limit.bound - (whole if limit.what == "loss" and not limit.change else 0.0)


def _kind(point: Point) -> str:
    return "taken" if point.within else "refused"


def _axes(
    xs: Axis, ys: Axis, left: float, width: float, height: float, across: str, up: str
) -> str:
    parts = []
    for tick in ys.ticks:
        y = _TOP + height * (1 - ys.at(tick))
        parts.append(f'<path class="grid" d="M{left:g} {y:.1f}h{width:g}"/>')
        parts.append(
            f'<text x="{left - 8:g}" y="{y + 4:.1f}" text-anchor="end">{written(tick)}</text>'
        )
    bottom = _TOP + height
    for tick in xs.ticks:
        x = left + width * xs.at(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom:g}v5"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 20:g}" text-anchor="middle">{written(tick)}</text>'
        )
    middle = _TOP + height / 2
    parts.append(
        f'<text x="{left + width / 2:g}" y="{_HEIGHT - 10}" text-anchor="middle">{across}</text>'
        f'<text x="14" y="{middle:g}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle:g})">{up}</text>'
    )
    return "".join(parts)


def _mark(kind: str, x: float, y: float) -> str:
    at = f'cx="{x:.1f}" cy="{y:.1f}"'
    if kind == "refused":
        return (
            f'<path class="refused" d="M-4 -4L4 4M-4 4L4 -4" transform="translate({x:.1f} {y:.1f})"'
            "/>"
        )
    ring = f'<circle class="chosen" {at} r="7"/>' if kind == "chosen" else ""
    return f'<circle class="taken" {at} r="3.5"/>{ring}'


def _legend(curve: Curve, bound: float | None, bars: bool) -> str:
    """What the marks are, in a row; only those that are there."""
    kinds = dict.fromkeys(_kind(point) for point in curve.points)
    entries = [(_mark(kind, 8, -4), kind) for kind in kinds]
    entries.append((_mark("chosen", 8, -4), "chosen"))
    entries.append((f'<path class="asked" d="{_LINE}"/>', f"asked {curve.share:g}"))
    if bound is not None:
        entries.append((f'<path class="bound" d="{_LINE}"/>', "bound"))
    if bars:
        entries.append(('<path class="bar" d="M8 -11v14"/>', "error"))
    parts, x = [], 16.0
    for drawn, words in entries:
        parts.append(f'<g transform="translate({x:g} 46)">{drawn}<text x="20">{words}</text></g>')
        x += 32 + 6.6 * len(words)
    return "".join(parts)
