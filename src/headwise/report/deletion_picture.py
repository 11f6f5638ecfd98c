"""Curves of deletion or insertion as a picture."""

from __future__ import annotations

from headwise.instruments.curves import Curves
from headwise.papers import Picture
from headwise.report.picture import svg

__all__ = ["deletion_picture"]


def deletion_picture(curves: Curves, title: str = "") -> str:
    """One `<svg>` with the mean curve of every order, and of random ones; light and dark."""
    gone = "deleted" if curves.mode == "deletion" else "put back"
    gains = ", ".join(f"{n} {curves.gain(n)}" for n in curves.curves if "reversed" not in n)
    return svg(
        Picture(
            title=title or f"{curves.mode}: gain over random orders: {gains}",
            x=f"share of positions {gone}",
            y=curves.target,
            lines=curves.lines(),
        )
    )
