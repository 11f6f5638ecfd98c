"""What a lens saw: for each layer and position the likeliest tokens, and how the right one did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas

__all__ = ["Lens"]


@dataclass(eq=False, repr=False)
class Lens:
    """Readings of every layer at every row, a row being a position of an example (or an example,
    where the model gives one answer for it).

    layers: names, from the embedding to what the last layer leaves. example, position, token,
    target `(rows,)`: position and token are -1 where an answer is for the whole example, target is
    -1 where there is none. top, top_probability `(layers, rows, k)`: the likeliest tokens, best
    first. loss `(layers, rows)`: -log p(target) in nats, NaN without a target; rank: tokens with a
    larger logit, -1 without. entropy, kl: nats, kl being KL(final answer || this layer's).
    words: what ids are called. provenance: where it comes from.
    """

    kind: str
    layers: list[str]
    example: np.ndarray
    position: np.ndarray
    token: np.ndarray
    target: np.ndarray
    top: np.ndarray
    top_probability: np.ndarray
    loss: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    words: dict[int, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def probability(self) -> np.ndarray:
        """p(target) `(layers, rows)`, NaN without a target."""
        return np.asarray(np.exp(-self.loss))

    def word(self, token: int) -> str:
        return self.words.get(int(token), str(int(token)))

    def by_layer(self) -> dict[str, np.ndarray]:
        """Means over rows, each `(layers,)`: loss, accuracy, rank (of rows with a target), entropy,
        kl, and `agreement`, the share of rows whose first token is the final one."""
        asked = self.target >= 0
        nothing = np.full(len(self.layers), np.nan)
        known = bool(asked.any())
        return {
            "loss": self.loss[:, asked].mean(1) if known else nothing,
            "accuracy": (self.top[:, asked, 0] == self.target[asked]).mean(1) if known else nothing,
            "rank": self.rank[:, asked].mean(1) if known else nothing,
            "entropy": self.entropy.mean(1),
            "kl": self.kl.mean(1),
            "agreement": (self.top[..., 0] == self.top[-1, :, 0]).mean(1),
        }

    def rows_of(self, example: int) -> np.ndarray:
        """Rows of one example, in order. Raises LookupError where there are none."""
        rows = np.flatnonzero(self.example == example)
        if not len(rows):
            raise LookupError(
                f"no example {example}; there are {int(self.example.max()) + 1}, from 0"
            )
        return rows

    def table(self, example: int = 0, first: int = 0, count: int = 12, width: int = 9) -> str:
        """The likeliest token of each layer (down, last on top) at `count` positions from `first`
        of an example; * where it is the target. Words are cut to `width` letters."""
        rows = self.rows_of(example)[first : first + count]
        name = max(map(len, self.layers))

        def line(head: str, cells: list[str]) -> str:
            return f"{head:>{name}}  " + " ".join(f"{c[:width]:<{width}}" for c in cells).rstrip()

        lines = [line("reads", [_shown(self.word(t)) if t >= 0 else "-" for t in self.token[rows]])]
        for layer in range(len(self.layers) - 1, -1, -1):
            cells = []
            for row in rows:
                right = self.top[layer, row, 0] == self.target[row]
                cells.append(("*" if right else " ") + _shown(self.word(self.top[layer, row, 0])))
            lines.append(line(self.layers[layer], cells))
        said = [_shown(self.word(t)) if t >= 0 else "-" for t in self.target[rows]]
        lines.append(line("target", [f" {word}" for word in said]))
        return "\n".join(lines)

    def frame(self) -> pandas.DataFrame:
        """One line for each layer and row. Raises ImportError if pandas is not installed (extra:
        frame)."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Lens.frame() needs pandas, which is not installed: pip install 'headwise[frame]'"
            ) from error
        layers, rows = self.loss.shape
        each = {name: np.tile(getattr(self, name), layers) for name in _ROW}
        return pandas.DataFrame(
            {
                "layer": np.repeat(np.arange(layers), rows),
                **each,
                "top": self.top[..., 0].ravel(),
                "word": [self.word(t) for t in self.top[..., 0].ravel()],
                "top_probability": self.top_probability[..., 0].ravel(),
                **{name: getattr(self, name).ravel() for name in _CELL},
            }
        )

    def __repr__(self) -> str:
        means = self.by_layer()
        lines = [
            f"{self.kind} lens: {self.loss.shape[1]} rows",
            f"{'':<16}loss   right  entropy  KL",
        ]
        for number, name in enumerate(self.layers):
            lines.append(
                f"{name:<14} {means['loss'][number]:6.3f}  {means['accuracy'][number]:6.3f}  "
                f"{means['entropy'][number]:6.3f} {means['kl'][number]:6.3f}"
            )
        return "\n".join(lines)


_ROW = ("example", "position", "token", "target")
_CELL = ("loss", "probability", "rank", "entropy", "kl")


def _shown(word: str) -> str:
    return word.replace("\n", "\\n").replace("\t", "\\t")
