"""What is known about a model whose circuit is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from headwise.tasks.task import Batch, Task


class KnownEdge(NamedTuple):
    """A path of one step through the residual stream, with the names of `instruments.nodes`.

    sender: "embed", a head "L0H1" or a feed-forward layer "L0 mlp". receiver: a head with the input
    that reads, "L1H2.q", ".k" or ".v", a feed-forward layer, or "logits".
    """

    sender: str
    receiver: str


@dataclass(frozen=True, eq=False)
class Contrast:
    """Pairs of problems that differ where the circuit looks.

    clean, corrupted: what the model is called with, of equal shape. right: the clean answer
    `(batch,)`, wrong: the corrupted one; asked at position `at` (ignored where the model gives one
    answer an example). What the circuit does with one and with the other is opposite.
    """

    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    right: Tensor
    wrong: Tensor
    at: int = -1


@dataclass(frozen=True, eq=False)
class KnownCircuit:
    """A model and the truth about it.

    model: of our own parts, in eval mode, norms left out, so that every sum of the residual stream
    can be followed. task: what it does, with accuracy `accuracy` (1.0 unless said). heads: the
    (layer, head) without which it cannot; feeds: such feed-forward layers, by layer. All other
    heads and feed-forward layers may be taken away without any effect on the loss. edges: paths of
    one step that carry the behaviour. decoys: idle heads that look as if they did it, with what
    they look like. contrast(size, seed): pairs of problems. control(): a model that solves the
    same task in another way, with its own truth (None for a control).
    """

    name: str
    model: nn.Module
    task: Task
    heads: frozenset[tuple[int, int]]
    feeds: frozenset[int]
    edges: frozenset[KnownEdge]
    decoys: dict[tuple[int, int], str]
    contrast: Callable[[int, int], Contrast]
    control: Callable[[], KnownCircuit] | None = None
    accuracy: float = 1.0
    facts: dict[str, object] = field(default_factory=dict)
    """What else is known: frequencies, the layer of a memory."""

    def batch(self, size: int, seed: int = 0) -> Batch:
        """Problems of the task that no training saw."""
        return self.task.batch(seed, size, "test")
