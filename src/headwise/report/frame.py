"""A picture of any size around what is drawn: colours for light and dark ground, title, ground."""

from __future__ import annotations

from html import escape

from headwise.report.picture import DARK, LIGHT, STYLE

__all__ = ["framed"]


def framed(body: str, title: str, width: float, height: float, more: str = "") -> str:
    """One `<svg>` that needs nothing else. more: style rules beside those of all pictures."""
    dark = f"@media (prefers-color-scheme: dark) {{ .hw-picture {{ {DARK} }} }}"
    style = f"<style>.hw-picture {{ {LIGHT} }} {dark} {STYLE} {more}</style>"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" class="hw-picture" role="img" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'aria-label="{escape(title)}">{style}'
        '<rect width="100%" height="100%" fill="var(--hw-paper)"/>'
        f'<text class="title" x="16" y="24">{escape(title)}</text>{body}</svg>\n'
    )
