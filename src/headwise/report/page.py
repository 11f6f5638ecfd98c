"""Fill the template: styles, script and the atlas as JSON, in one file that needs nothing else."""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from headwise import __version__
from headwise.instruments.atlas import Atlas
from headwise.instruments.atomic import write_atomically
from headwise.instruments.compare import Comparison
from headwise.report.changes import changes
from headwise.report.payload import Detail, payload

__all__ = ["LARGEST", "compare", "write"]

LARGEST = 5_000_000
"""Bytes that a page stays below, by leaving out detail (and saying so)."""

# In the order in which they run; each file is one part of the page.
_STYLES = ("page.css", "figures.css", "card.css", "paper.css")
_SCRIPTS = (
    "base.js", "colour.js", "scale.js", "state.js", "hint.js", "top.js", "legend.js", "thumbs.js",
    "map.js", "tile.js", "card.js", "depth.js", "changes.js", "unused.js", "scatter.js",
    "cause.js", "alike.js", "table.js", "source.js", "start.js",
)  # fmt: skip

# What is given up, one after the other, until a page is small enough.
_DETAIL = (
    Detail(),
    Detail(tile=32),
    Detail(tile=32, pairs=("similarity",)),
    Detail(tile=24, pairs=("similarity",)),
    Detail(tile=16, pairs=()),
    Detail(tile=0, pairs=()),
    Detail(tile=0, pairs=(), spread=False),
    Detail(tile=0, pairs=(), spread=False, digits=3),
)


def write(atlas: Atlas, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the report of an atlas as one HTML file, all of it or nothing; return its path.

    The page makes no network request (a content security policy forbids it one) and stays below
    `LARGEST` bytes: for very large models tiles are cut first, then similarities of all pairs,
    then standard errors; the page says what it left out. title: the heading; by default the
    model's name. Folders that do not exist are made.

    Everything in the atlas is taken as untrusted text: it reaches the page as data, never as
    markup. Raises ValueError for an atlas without heads.
    """
    if not len(atlas):
        raise ValueError("the atlas holds no heads: there is nothing to show")
    return _written(path, lambda detail: payload(atlas, detail, title))


def compare(
    comparison: Comparison, path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Write what changed between two atlases as a page of the same make; return its path.

    The numbers of the map, the table and the cards are differences, after minus before.
    """
    return _written(path, lambda detail: changes(comparison, detail, title))


def _written(path: str | os.PathLike[str], content: Callable[[Detail], dict[str, Any]]) -> Path:
    """The page with as much detail as fits."""
    for detail in _DETAIL:
        page = _page(content(detail))
        if len(page) < LARGEST:
            break
    path = Path(path)
    write_atomically(path, page)
    return path


def _page(content: dict[str, Any]) -> bytes:
    style = "\n".join(map(_asset, _STYLES))
    script = '(() => {\n"use strict";\n' + "\n".join(map(_asset, _SCRIPTS)) + "})();\n"
    early = _asset("early.js")  # before anything is drawn, so that no wrong colours flash
    return _fill(
        _asset("page.html"),
        {
            "policy": _policy([style], [early, script]),
            "early": early,
            "version": html.escape(__version__),
            "title": html.escape(_printable(content["title"])),
            "eyebrow": html.escape(content["eyebrow"]),
            "sentence": html.escape(_printable(" ".join(content["sentences"]))),
            "style": style,
            "script": script,
            "data": embedded(content),
        },
    )


def embedded(content: dict[str, Any]) -> str:
    """JSON that can stand inside a <script> element: plain ASCII without <, > and &."""
    text = json.dumps(_whole(content), separators=(",", ":"), allow_nan=False)
    # json escapes what is not ASCII, U+2028 among it; these three are left
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _whole(value: Any) -> Any:
    """The same with half characters (lone surrogates) marked: not every program bears them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole(key): _whole(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(entry) for entry in value]
    return value


def _policy(styles: list[str], scripts: list[str]) -> str:
    """Nothing may be loaded, sent or run but what this very page was written with."""
    return "; ".join((
        "default-src 'none'",
        "img-src data:",
        f"style-src {' '.join(map(_digest, styles))}",
        f"script-src {' '.join(map(_digest, scripts))}",
        "base-uri 'none'",
        "form-action 'none'",
    ))  # fmt: skip


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _fill(template: str, values: dict[str, str]) -> bytes:
    # one pass, so that nothing in a value is taken for a placeholder
    filled = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
    return filled.encode("utf-8")


def _asset(name: str) -> str:
    return resources.files("headwise.report").joinpath("assets", name).read_text(encoding="utf-8")


def _printable(text: str) -> str:
    """Text that any encoder takes: control characters and lone surrogates become a mark."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
