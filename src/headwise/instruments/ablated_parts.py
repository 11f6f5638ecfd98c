"""What can be taken out of a model: heads, sets of heads, attentions, MLPs, layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headwise.edits.selectors import names_of, select
from headwise.models import AttentionView, ModelView, Site, sites_of

__all__ = ["WHAT", "Part", "heads_site", "part_of_heads", "parts_of", "update_site"]

WHAT = ("heads", "layers", "attention", "mlp")


@dataclass(frozen=True, eq=False)
class Part:
    """What is taken out at once.

    `takes`: site -> the heads that are exchanged there, None for all that is there. The site of a
    layer is the residual that it leaves; what is exchanged there is what the layer has added.
    """

    name: str
    takes: Mapping[Site, tuple[int, ...] | None]


def heads_site(view: ModelView, attention: AttentionView) -> Site:
    """Where the outputs of an attention's heads are."""
    stack = attention.stack if len(view.stacks) > 1 else None
    return Site("heads", attention.layer, stack, attention.kind)


def update_site(site: Site) -> Site:
    """The residual that a layer reads, of the residual that it leaves."""
    return Site("residual", site.layer - 1, site.stack)


def parts_of(view: ModelView, what: str) -> list[Part]:
    """Every part of a sort, in order of execution.

    Raises ValueError for a sort that is not one of `WHAT`.
    """
    if what == "heads":
        return [
            Part(names_of(view, [(a, h)])[0], {heads_site(view, a): (h,)})
            for a in view.attentions
            for h in range(a.heads)
        ]
    if what == "layers":
        sites = sites_of(view, "residual")
        return [Part(f"layer {s.layer - 1}", {s: None}) for s in sites if s.layer > 0]
    if what in ("attention", "mlp"):
        return [Part(str(site), {site: None}) for site in sites_of(view, what)]
    if what == "tokens":
        raise ValueError("what='tokens': an Atlas has no positions; see ablate_tokens")
    raise ValueError(f"what={what!r}: expected one or several of {', '.join(WHAT)}")


def part_of_heads(view: ModelView, selector: Any) -> Part:
    """The heads that a selector names (see `headwise.edits.selectors`), taken out together."""
    chosen = select(view, selector)
    takes: dict[Site, tuple[int, ...] | None] = {}
    for attention, own in _by_attention(chosen).items():
        takes[heads_site(view, attention)] = tuple(own)
    return Part(", ".join(names_of(view, chosen)), takes)


def _by_attention(
    heads: Iterable[tuple[AttentionView, int]],
) -> dict[AttentionView, list[int]]:
    found: dict[AttentionView, list[int]] = {}
    for attention, head in heads:
        found.setdefault(attention, []).append(head)
    return found
