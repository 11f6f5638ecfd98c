"""Circuits: the components that an answer goes through, and the paths between them.

Found from the answer backwards: whatever changes it along a direct path is in, and becomes a
receiver itself, of queries, keys and values (Wang et al., arXiv 2211.00593; automatic variants:
Conmy et al., arXiv 2304.14997). How good a circuit is, is measured by running it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from headwise.instruments.examples import model_view
from headwise.instruments.exchange import PASS_TOKENS
from headwise.instruments.nodes import Named, Node, ports
from headwise.instruments.paths import path_patch
from headwise.models import ModelView

__all__ = ["Circuit", "Edge", "find_circuit"]


@dataclass(frozen=True)
class Edge:
    """A path: what `sender` gives matters to what `receiver` is handed.

    weight: change of the metric where the path is corrupted, as a share of the gap between the
    clean and the corrupted run: 0.3 is a path that carries 30 % of the answer, below zero one
    that works against it. error: its standard error over the examples.
    """

    sender: Node
    receiver: Node
    weight: float
    error: float = float("nan")

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver} ({self.weight:+.2f})"


@dataclass(frozen=True, eq=False)
class Circuit:
    """Components and the paths between them, strongest first.

    metric, threshold, mlps: how it was found; provenance: on what. shared: heads that use one
    key-value head together, whose number stands in "L1H0.k" and "L1H0.v".
    """

    edges: tuple[Edge, ...]
    metric: str = ""
    threshold: float = 0.0
    mlps: str = "run"
    shared: int = 1
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that send, in order of computation; the logits, which all lead to, are not told."""
        found = {edge.sender for edge in self.edges}
        return tuple(sorted(found, key=lambda n: (n.order, n.head or 0)))

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of its heads, as `headwise.swap` takes them."""
        return [(n.layer, n.head or 0) for n in self.nodes if n.kind == "head"]

    def receiving(self, edge: Edge) -> list[Node]:
        """The components of the circuit that an edge leads into: those that use what it changes."""
        to = edge.receiver
        if to.kind in ("logits", "mlp", "head"):
            return [to]
        share = 1 if to.kind == "queries" else self.shared
        return [
            n
            for n in self.nodes
            if n.kind == "head" and n.layer == to.layer and (n.head or 0) // share == to.head
        ]

    def into(self, receiver: Named) -> list[Edge]:
        """The paths to one receiver, strongest first."""
        to = Node.of(receiver)
        return [edge for edge in self.edges if edge.receiver == to]

    def overlap(self, other: Circuit) -> float:
        """Heads that both have, of those that either has (Merullo et al., arXiv 2310.08744);
        NaN where neither has any."""
        mine, theirs = set(self.heads), set(other.heads)
        either = mine | theirs
        return len(mine & theirs) / len(either) if either else float("nan")

    def record(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        edges = [
            {"sender": str(e.sender), "receiver": str(e.receiver), "weight": e.weight}
            | ({"error": e.error} if np.isfinite(e.error) else {})
            for e in self.edges
        ]
        facts = {name: getattr(self, name) for name in ("metric", "threshold", "mlps", "shared")}
        return (
            facts
            | {"nodes": list(map(str, self.nodes)), "edges": edges}
            | {"provenance": self.provenance}
        )

    def __repr__(self) -> str:
        told = ", ".join(map(str, self.edges[:6]))
        more = f" and {len(self.edges) - 6} more" if len(self.edges) > 6 else ""
        return f"Circuit({len(self.nodes)} components, {len(self.edges)} paths: {told}{more})"


def find_circuit(
    model: nn.Module | ModelView,
    clean: Any,
    corrupted: Any,
    metric: Any,
    threshold: float = 0.05,
    *,
    mlps: str = "run",
    most: int = 32,
    tokenizer: Any | None = None,
    batch_size: int = 16,
    pass_tokens: int = PASS_TOKENS,
    step: Callable[[str], None] | None = None,
) -> Circuit:
    """The paths that carry at least `threshold` of the answer, from the logits backwards.

    clean, corrupted, metric: as in `path_patch`. threshold: share of the gap between the runs.
    mlps: "run" lets paths lead through them; "hold" makes them components. most: heads (and MLPs)
    that are asked in turn what they are handed, the last ones, and so those nearest to the
    answer, first. step: called with the name of each.

    Cost: one pass over all senders for each layer of receivers, and a run from the receiver on for
    each path. Raises ValueError where both runs are equally good, so that there is nothing to
    explain, and as `path_patch` does.
    """
    if threshold <= 0:
        raise ValueError(f"threshold={threshold}: expected a share above 0, such as 0.05")
    view = model_view(model)
    found: dict[tuple[Node, Node], Edge] = {}
    asked: set[Node] = set()
    waiting: list[Node] = [Node("logits")]
    facts: dict[str, Any] = {}
    while waiting and len(asked) <= most:
        layer = max(n.order for n in waiting)
        now = [n for n in waiting if n.order == layer]
        waiting = [n for n in waiting if n.order != layer]
        asked |= set(now)
        receivers = list(dict.fromkeys(p for n in now for p in _ports(view, n)))
        if step is not None:
            step(", ".join(map(str, now)))
        table = path_patch(
            view, clean, corrupted, metric, receivers, mlps=mlps, tokenizer=tokenizer,
            batch_size=batch_size, pass_tokens=pass_tokens,
        )  # fmt: skip
        if table.gap == 0:
            raise ValueError(
                f"clean and corrupted inputs give the same {table.metric} "
                f"({table.clean.mean():.4g}): there is no answer to explain"
            )
        facts = {"model": table.provenance["model"], "metric": table.metric, "gap": table.gap}
        for edge in _strong(table, receivers, threshold):
            found[edge.sender, edge.receiver] = edge
            if edge.sender.kind != "embed" and edge.sender not in asked | set(waiting):
                waiting.append(edge.sender)
    edges = sorted(found.values(), key=lambda edge: -abs(edge.weight))
    provenance = facts | {"not_asked": list(map(str, waiting))}
    shared = max((a.heads // a.kv_heads for a in view.attentions), default=1)
    return Circuit(tuple(edges), str(facts["metric"]), threshold, mlps, shared, provenance)


def _ports(view: ModelView, node: Node) -> list[Node]:
    return ports(view, node) if node.kind == "head" else [node]


def _strong(table: Any, receivers: list[Node], threshold: float) -> Iterable[Edge]:
    lost = 1 - table.normalised
    for i, sender in enumerate(table.axes["sender"]):
        for j, receiver in enumerate(receivers):
            if abs(lost[i, j]) >= threshold:
                error = float(table.normalised_errors[i, j])
                yield Edge(Node.of(sender), receiver, float(lost[i, j]), error)
