"""Examples on which causes are measured: what users hand over, in batches that run together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.inputs import digest, read_inputs
from headwise.instruments.tokens import Tokens
from headwise.models import ModelView, view

__all__ = ["Examples", "digests", "model_view", "read_examples", "together"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Some examples of equal length. inputs: on the model's device, every tensor with these
    examples in front, labels among them; rows: which examples of all they are."""

    inputs: dict[str, Tensor]
    rows: slice

    @property
    def given(self) -> dict[str, Tensor]:
        """What the model is called with: the inputs without labels, which are for metrics."""
        return {key: value for key, value in self.inputs.items() if key != "labels"}

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


def model_view(model: nn.Module | ModelView) -> ModelView:
    """The view of a model, or the view that was given."""
    return model if isinstance(model, ModelView) else view(model)


def read_examples(
    model: nn.Module,
    inputs: Any,
    tokenizer: Any | None = None,
    processor: Any | None = None,
    tokens: int | None = None,
    windows: int | None = None,
    batch_size: int = 16,
) -> list[Examples]:
    """Every input that `headwise.see` takes, cut into examples: in order, neighbours of equal
    length together, at most `batch_size` at a time.

    tokens: length of the windows that a text is cut into; windows: how many of each text (None:
    all). Raises ValueError and TypeError as `see` does for what cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more")
    if isinstance(inputs, Mapping):  # labels of None and the like are no inputs
        inputs = {key: value for key, value in inputs.items() if value is not None}
    words = Tokens(tokenizer, getattr(model, "config", None))
    sources = read_inputs(model, inputs, words, processor, tokens, windows)
    samples = [sample for source in sources for sample in source.samples]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    singles = [
        Examples({key: value.to(device) for key, value in sample.inputs.items()}, slice(n, n + 1))
        for n, sample in enumerate(samples)
    ]
    return together(singles, batch_size)


def together(singles: list[Examples], batch_size: int) -> list[Examples]:
    """Single examples as batches: in order, neighbours of equal shapes together, at most
    `batch_size` at a time; numbered anew."""
    found: list[Examples] = []
    start = 0
    while start < len(singles):
        stop = start + 1
        first = _shapes(singles[start])
        while stop < min(len(singles), start + batch_size) and _shapes(singles[stop]) == first:
            stop += 1
        batch = [single.inputs for single in singles[start:stop]]
        inputs = {
            key: torch.cat([one[key] for one in batch]) if value.dim() else value
            for key, value in batch[0].items()
        }
        found.append(Examples(inputs, slice(start, stop)))
        start = stop
    return found


def digests(batches: list[Examples]) -> list[str]:
    """A hash of each batch's inputs."""
    return [digest(batch.inputs).hex() for batch in batches]


def _shapes(one: Examples) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in one.inputs.items()}
