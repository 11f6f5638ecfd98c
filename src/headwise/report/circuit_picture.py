"""A circuit as a graph: embeddings at the bottom, the answer at the top, layers in between."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from headwise.instruments.circuit import Circuit, Edge
from headwise.instruments.nodes import Node
from headwise.report.frame import framed

__all__ = ["circuit_picture"]

_BOX, _TALL, _GAP, _ROW = 76, 30, 34, 104
_LEFT, _TOP = 84, 58
_PORTS = {"queries": -24.0, "keys": 0.0, "values": 24.0}
_NUMBERS = 16  # edges beside which a number finds room
_MORE = """
.hw-picture .box { fill: var(--hw-paper); stroke: var(--hw-muted); stroke-width: 1.4; }
.hw-picture .mlp { rx: 2px; stroke-dasharray: 4 2; }
.hw-picture .node { fill: var(--hw-ink); text-anchor: middle; font-weight: 600; }
.hw-picture .port { text-anchor: middle; font-size: 10px; }
.hw-picture .edge { fill: none; stroke: var(--hw-0); opacity: 0.8; }
.hw-picture .against { stroke: var(--hw-1); stroke-dasharray: 6 5; }
.hw-picture .number { font-size: 10px; text-anchor: middle; paint-order: stroke;
  stroke: var(--hw-paper); stroke-width: 4px; }
.hw-picture .row { text-anchor: end; font-size: 11px; }
"""


@dataclass
class _Place:
    x: float
    y: float


def circuit_picture(circuit: Circuit, title: str = "Circuit") -> str:
    """One `<svg>`, light and dark: edges as wide as they are strong, dashed where a path works
    against the answer, with their share of the answer as a number where there are few.

    Raises ValueError for a circuit without paths.
    """
    if not circuit.edges:
        raise ValueError("the circuit has no paths: there is nothing to draw")
    rows = _rows(circuit)
    count = max(len(row) for row in rows)
    lane = _BOX + _GAP if any(n.kind == "mlp" for n in circuit.nodes) else 0
    width = max(420.0, _LEFT + count * (_BOX + _GAP) + lane + 24)
    width = max(width, 24 + 7.5 * len(title))
    height = _TOP + (len(rows) - 1) * _ROW + _TALL + 56
    places: dict[Node, _Place] = {}
    for number, row in enumerate(rows):
        step = (width - lane - _LEFT - 24) / len(row)
        for i, node in enumerate(row):
            y = _TOP + (len(rows) - 1 - number) * _ROW + _TALL / 2
            # an MLP stands at the side, so that paths between heads pass it
            x = width - 24 - _BOX / 2 if node.kind == "mlp" else _LEFT + step * (i + 0.5)
            places[node] = _Place(x, y)
    strongest = max(abs(edge.weight) for edge in circuit.edges)
    edges = [_drawn(circuit, edge, places, strongest, width) for edge in reversed(circuit.edges)]
    parts = [piece for pieces in edges for piece in pieces[0]]
    for number, row in enumerate(rows):
        y = _TOP + (len(rows) - 1 - number) * _ROW + _TALL / 2 + 4
        told = {"embed": "input", "logits": "answer"}.get(row[0].kind, f"layer {row[0].layer}")
        parts.append(f'<text class="row" x="{_LEFT - 28}" y="{y:g}">{told}</text>')
    parts += [_box(node, place, circuit) for node, place in places.items()]
    if len(circuit.edges) <= _NUMBERS:
        parts += [piece for pieces in edges for piece in pieces[1]]
    against = any(edge.weight < 0 for edge in circuit.edges)
    note = "width: share of the answer that the path carries" + (
        "; dashed: against it" if against else ""
    )
    parts.append(f'<text class="label" x="16" y="{height - 12:g}">{escape(note)}</text>')
    return framed("".join(parts), title, width, height, _MORE)


def _rows(circuit: Circuit) -> list[list[Node]]:
    """Nodes of equal order side by side, from below; each near to what it sends to."""
    nodes = [*circuit.nodes, Node("logits")]
    at: dict[Node, float] = {}
    rows = []
    for order in sorted({n.order for n in nodes}, reverse=True):
        row = [n for n in nodes if n.order == order]
        wanted = {node: _pull(circuit, node, at) for node in row}
        row.sort(key=lambda node, wanted=wanted: (wanted[node], node.head or 0))  # type: ignore[misc]
        at |= {node: (i + 0.5) / len(row) for i, node in enumerate(row)}
        rows.append(row)
    return rows[::-1]


def _pull(circuit: Circuit, node: Node, at: dict[Node, float]) -> float:
    """Mean place of what a node sends to, by strength."""
    pulls = [
        (abs(edge.weight), at[to])
        for edge in circuit.edges
        if edge.sender == node
        for to in circuit.receiving(edge)
        if to in at
    ]
    total = sum(weight for weight, _ in pulls)
    return sum(weight * x for weight, x in pulls) / total if total else 0.5


def _drawn(
    circuit: Circuit, edge: Edge, places: dict[Node, _Place], strongest: float, width: float
) -> tuple[list[str], list[str]]:
    """The edge's curves and its numbers; one for each head that uses what it changes."""
    wide = 1 + 9 * abs(edge.weight) / strongest
    kind = "edge against" if edge.weight < 0 else "edge"
    curves, numbers = [], []
    for to in circuit.receiving(edge):
        points = _route(edge, to, places, width)
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = points
        path = f"M{x0:.1f} {y0:.1f}C{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} {x3:.1f} {y3:.1f}"
        curves.append(
            f'<path class="{kind}" d="{path}" stroke-width="{wide:.1f}">'
            f"<title>{escape(str(edge))}</title></path>"
        )
        x, y = _along(points, 0.4)  # nearer to the sender, where paths to one place are apart
        numbers.append(
            f'<text class="number" x="{x:.1f}" y="{y + 3:.1f}">{edge.weight:+.2f}</text>'
        )
    return curves, numbers


_Points = tuple[tuple[float, float], ...]


def _route(edge: Edge, to: Node, places: dict[Node, _Place], width: float) -> _Points:
    """A curve from the top of the sender to the receiver's port that keeps off other boxes."""
    start, end = places[edge.sender], places[to]
    port = _PORTS.get(edge.receiver.kind)
    x0, y0 = start.x, start.y - _TALL / 2
    x1, y1 = end.x + (port or 0.0), end.y + _TALL / 2 + (0 if port is None else 15)
    bend = (y0 - y1) / 2
    others = [place for node, place in places.items() if node not in (edge.sender, to)]
    tried = []
    for aside in (0, 70, -70, 140, -140, 220, -220, 300, -300):
        points = ((x0, y0), (x0 + aside, y0 - bend), (x1 + aside, y1 + bend), (x1, y1))
        passed = [_along(points, k / 24) for k in range(1, 24)]
        hits = sum(
            abs(x - o.x) < _BOX / 2 + 5 and abs(y - o.y) < _TALL / 2 + 5
            for x, y in passed
            for o in others
        ) + sum(not _LEFT - 20 < x < width - 8 for x, _ in passed)
        if not hits:
            return points
        tried.append((hits, points))
    return min(tried, key=lambda one: one[0])[1]


def _along(points: _Points, t: float) -> tuple[float, float]:
    """Where a cubic curve is after the share t."""
    shares = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x = sum(share * point[0] for share, point in zip(shares, points, strict=True))
    return x, sum(share * point[1] for share, point in zip(shares, points, strict=True))


def _box(node: Node, place: _Place, circuit: Circuit) -> str:
    x, y = place.x - _BOX / 2, place.y - _TALL / 2
    kind = "box mlp" if node.kind == "mlp" else "box"
    round_ = 15 if node.kind in ("embed", "logits") else 4
    parts = [
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{_BOX}" height="{_TALL}" '
        f'rx="{round_}"/>',
        f'<text class="node" x="{place.x:.1f}" y="{place.y + 4:.1f}">{escape(str(node))}</text>',
    ]
    used = {e.receiver.kind for e in circuit.edges if node in circuit.receiving(e)}
    parts += [
        f'<text class="port" x="{place.x + shift:.1f}" y="{place.y + _TALL / 2 + 10:.1f}">'
        f"{kind[0]}</text>"
        for kind, shift in _PORTS.items()
        if kind in used
    ]
    return "".join(parts)
