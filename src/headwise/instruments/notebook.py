"""How an Atlas shows itself where it is typed: a few lines of text, or a small map of its heads."""

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from headwise.instruments.kinds import KINDS

if TYPE_CHECKING:
    from headwise.instruments.atlas import Atlas

__all__ = ["as_html", "as_text"]

_MOST_CELLS = 4096
# kind -> two letters, and the colour behind them
_MARKS = {
    "previous-token": ("pt", "#2f6fb3"),
    "induction": ("in", "#b3412f"),
    "duplicate": ("du", "#8a4fa3"),
    "retrieval": ("re", "#a8720f"),
    "sink": ("si", "#6b7280"),
    "broad": ("br", "#2f8a6b"),
    "delimiter": ("de", "#7a6a3a"),
    "positional": ("po", "#3f7fa0"),
    "local": ("lo", "#4f8a2f"),
    "mixed": ("mi", "#b4bac2"),
}


def _title(atlas: "Atlas") -> str:
    layers = len(
        {
            (str(stack), int(layer))
            for stack, layer in zip(
                atlas.heads.get("stack", [""] * len(atlas)), atlas.heads["layer"], strict=True
            )
        }
    )
    model = atlas.provenance.get("model")
    return (
        f"Atlas of {model or 'a model'}: {len(atlas)} heads in {layers} layers, "
        f"{len(atlas.heads)} columns"
    )


def _inputs(atlas: "Atlas") -> str:
    known = atlas.provenance
    texts = known.get("texts") or []
    tokens = sum(text.get("tokens") or 0 for text in texts)
    parts = [
        f"{len(texts)} text{'s' * (len(texts) != 1)}" if texts else "",
        f"{tokens:,} tokens" if tokens else "",
        str(known.get("dtype") or ""),
        str(known.get("device") or ""),
    ]
    return ", ".join(part for part in parts if part)


def _kinds(atlas: "Atlas") -> list[tuple[str, int]]:
    counts = Counter(atlas.heads["kind"].tolist() if "kind" in atlas.heads else [])
    known = [(kind, counts.pop(kind)) for kind in KINDS if kind in counts]
    return known + sorted(counts.items())


def as_text(atlas: "Atlas") -> str:
    """Model, size, inputs, kinds and columns in a few lines."""
    lines = [_title(atlas)]
    if _inputs(atlas):
        lines.append(f"  inputs   {_inputs(atlas)}")
    if _kinds(atlas):
        lines.append("  kinds    " + ", ".join(f"{kind} {n}" for kind, n in _kinds(atlas)))
    lines.append("  columns  " + ", ".join(name for name in atlas.heads))
    return "\n".join(lines)


def as_html(atlas: "Atlas") -> str:
    """The same with a map of the kinds, layers by heads, for a notebook cell."""
    parts = [f"<div><b>{escape(_title(atlas))}</b><br>{escape(_inputs(atlas))}</div>"]
    if _kinds(atlas):
        parts.append(
            "<div>"
            + " ".join(
                f'<span style="white-space:nowrap">{_cell(kind, kind)} {escape(kind)} {n}&ensp;'
                "</span>"
                for kind, n in _kinds(atlas)
            )
            + "</div>"
        )
        if len(atlas) <= _MOST_CELLS:
            parts.append(_map(atlas))
    return "".join(parts)


def _cell(kind: str, title: str) -> str:
    letters, colour = _MARKS.get(kind, _MARKS["mixed"])
    letters = letters if kind in _MARKS else kind[:2]
    ink = "#222" if colour == _MARKS["mixed"][1] else "#fff"
    return (
        f'<span title="{escape(title)}" style="background:{colour};color:{ink};'
        f'font:11px monospace;padding:0 3px;border-radius:2px">{escape(letters)}</span>'
    )


def _map(atlas: "Atlas") -> str:
    rows: dict[str, list[str]] = {}
    places = [
        key
        for key in ("stack", "attention")
        if key in atlas.heads and len(set(atlas.heads[key].tolist())) > 1
    ]
    for row in range(len(atlas)):
        words = [str(atlas.heads[key][row]) for key in places]
        line = " ".join([*words, f"L{atlas.heads['layer'][row]}"])
        kind = str(atlas.heads["kind"][row])
        reason = f": {atlas.reasons[row]}" if atlas.reasons else ""
        rows.setdefault(line, []).append(_cell(kind, f"{atlas.name(row)} {kind}{reason}"))
    width = max(map(len, rows), default=0)
    lines = "".join(
        f"<div><code>{escape(line.ljust(width))}</code> {' '.join(cells)}</div>"
        for line, cells in rows.items()
    )
    return f'<div style="line-height:1.5;white-space:pre">{lines}</div>'
