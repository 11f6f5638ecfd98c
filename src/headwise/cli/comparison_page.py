"""What changed between two atlases, as one small HTML page without scripts or requests."""

import os
import secrets
from html import escape
from pathlib import Path

from headwise.cli.tables import number
from headwise.instruments import Comparison
from headwise.instruments.compare import BETWEEN_HEADS, STANDARD_ERRORS

_STYLE = """
:root { color-scheme: light dark; --bar: #2f6fb3; --less: #b3412f; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid color-mix(in srgb,
  currentColor 15%, transparent); white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; height: .7rem; background: var(--bar); }
.less { background: var(--less); }
.warning { border-left: 4px solid var(--less); padding-left: .7rem; margin: .3rem 0; }
"""


def write_page(comparison: Comparison, path: Path, rows: int = 20) -> Path:
    """Write the page, all of it or nothing, and return its path.

    rows: how many of the largest changes are shown, in each unit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        waiting.write_text(page(comparison, rows), encoding="utf-8")
        os.replace(waiting, path)
    finally:
        waiting.unlink(missing_ok=True)
    return path


def page(comparison: Comparison, rows: int) -> str:
    """The HTML of the whole page."""
    a, b = map(escape, comparison.models)
    parts = [f"<h1>{a} &rarr; {b}</h1>", f"<p>{len(comparison)} heads in both.</p>"]
    parts += [f'<p class="warning">{escape(line)}</p>' for line in comparison.warnings]
    for name, heads in ((a, comparison.only_a), (b, comparison.only_b)):
        if heads:
            parts.append(
                f"<details><summary>{len(heads)} heads only in {name}</summary>"
                f"{escape(', '.join(heads))}</details>"
            )
    parts.append(_kinds(comparison))
    parts += [_changes(comparison, rows, unit) for unit in (STANDARD_ERRORS, BETWEEN_HEADS)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{a} and {b}: what changed, by head</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _kinds(comparison: Comparison) -> str:
    if comparison.kinds is None:
        return ""
    changed = comparison.changed_kinds()
    if not changed:
        return "<h2>Kinds</h2><p>No head changed its kind.</p>"
    lines = [
        f"<tr><td>{escape(head)}</td><td>{escape(before)}</td><td>{escape(after)}</td></tr>"
        for head, before, after in changed
    ]
    return (
        f"<h2>Kinds: {len(changed)} heads changed</h2>"
        f"<table><tr><th>head</th><th>before</th><th>after</th></tr>{''.join(lines)}</table>"
    )


def _changes(comparison: Comparison, rows: int, unit: str) -> str:
    changes = comparison.largest(rows, unit=unit)
    if not changes:
        return ""
    widest = max(change.size for change in changes) or 1.0
    lines = []
    for change in changes:
        style = "bar less" if change.difference < 0 else "bar"
        width = 8 * change.size / widest
        lines.append(
            f"<tr><td>{escape(change.head)}</td><td>{escape(change.column)}</td>"
            f'<td class="n">{number(change.a)}</td><td class="n">{number(change.b)}</td>'
            f'<td class="n">{change.difference:+.3g}</td><td class="n">{change.size:.1f}</td>'
            f'<td><span class="{style}" style="width:{width:.2f}rem"></span></td></tr>'
        )
    titles = "".join(f"<th>{t}</th>" for t in ("head", "column"))
    titles += "".join(f'<th class="n">{t}</th>' for t in ("before", "after", "change", "size"))
    return (
        f"<h2>Largest changes, size in {unit}</h2>"
        f"<table><tr>{titles}<th></th></tr>{''.join(lines)}</table>"
    )
