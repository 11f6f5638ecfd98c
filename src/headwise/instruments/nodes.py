"""Components of a model by name, as circuits are spoken of.

embed      what the first layer reads: token (and position) embeddings
L3H1       a head; as a receiver, all that it computes from
L3H1.q     the queries of a head, .k the keys, .v the values: receivers only. Where heads share
           keys and values, the number is that of the shared one
L3 mlp     the feed-forward part of a layer
logits     what the model answers: a receiver only
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from headwise.models import ModelView, UnsupportedModelError
from headwise.models.sites import Site, sites_of

__all__ = ["Group", "Named", "Node", "group", "heads_of", "ports", "senders_of"]

_PORTS = {"q": "queries", "k": "keys", "v": "values"}
_WRITTEN = re.compile(r"L(\d+)(?:H(\d+)(?:\.([qkv]))?| ?mlp)")
_LAST = 1 << 30


@dataclass(frozen=True)
class Node:
    """One component. kind: "embed", "head", "queries", "keys", "values", "mlp" or "logits"."""

    kind: str
    layer: int = 0
    head: int | None = None

    @classmethod
    def of(cls, name: str | Node) -> Node:
        """Raises ValueError for what is no name of a component."""
        if isinstance(name, Node):
            return name
        if name in ("embed", "logits"):
            return cls(name)
        found = _WRITTEN.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{name!r} names no component; expected embed, L3H1, L3H1.q (.k, .v), L3 mlp or "
                "logits"
            )
        layer, head, port = found.groups()
        if head is None:
            return cls("mlp", int(layer))
        return cls(_PORTS[port] if port else "head", int(layer), int(head))

    @property
    def order(self) -> tuple[int, int]:
        """When it is computed; a sender comes before what it sends to."""
        if self.kind in ("embed", "logits"):
            return (-1, 0) if self.kind == "embed" else (_LAST, 0)
        return self.layer, int(self.kind == "mlp")

    @property
    def site(self) -> Site:
        """Where its value is read and written. The logits have none: LookupError."""
        kinds = {"embed": "residual", "head": "heads", "mlp": "mlp"}
        if self.kind == "logits":
            raise LookupError("logits are no site")
        return Site(kinds.get(self.kind, self.kind), self.layer)

    def __str__(self) -> str:
        if self.kind in ("embed", "logits"):
            return self.kind
        if self.kind == "mlp":
            return f"L{self.layer} mlp"
        port = "" if self.kind == "head" else f".{self.kind[0]}"
        return f"L{self.layer}H{self.head}{port}"


Named = str | Node
Group = tuple[Node, ...]
"""Components that are patched together."""


def group(given: Named | Sequence[Named]) -> Group:
    """One name, or several that belong together. Raises ValueError as `Node.of` does."""
    names = [given] if isinstance(given, str | Node) else list(given)
    if not names:
        raise ValueError("an empty group of components")
    return tuple(Node.of(name) for name in names)


def heads_of(view: ModelView) -> list[Node]:
    """Every head, layer by layer. Raises UnsupportedModelError for models of several stacks, where
    (layer, head) is not enough of a name."""
    if len(view.stacks) > 1:
        raise UnsupportedModelError(
            f"{type(view.model).__name__} has the stacks {', '.join(view.stacks)}; paths are "
            "followed in models of one stack"
        )
    return [Node("head", a.layer, head) for a in view.attentions for head in range(a.heads)]


def senders_of(view: ModelView, mlps: bool) -> list[Node]:
    """All that writes to the residual: the embedding, every head, and with `mlps` these."""
    found = [Node("embed"), *heads_of(view)]
    if mlps:
        found += [Node("mlp", site.layer) for site in sites_of(view, "mlp")]
    return sorted(found, key=lambda one: (one.order, one.head or 0))


def ports(view: ModelView, head: Node) -> list[Node]:
    """Queries, keys and values of a head; where keys and values are shared, those it uses."""
    attention = next(a for a in view.attentions if a.layer == head.layer)
    shared = (head.head or 0) * attention.kv_heads // attention.heads
    return [
        Node("queries", head.layer, head.head),
        Node("keys", head.layer, shared),
        Node("values", head.layer, shared),
    ]
