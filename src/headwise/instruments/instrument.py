"""What an instrument is: it is handed each attention and each layer, and returns numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from headwise.instruments.batch import Batch
from headwise.instruments.columns import Column
from headwise.instruments.reading import Reading
from headwise.models import AttentionView, LayerReading, LayerView, ModelView

__all__ = ["Findings", "Instrument", "Numbers", "Tables"]

Numbers = dict[str, Tensor]
"""Column -> `(batch, heads)` for an attention, `(batch,)` for a layer."""


@dataclass
class Findings:
    """What an instrument says after a batch: pairs, name -> `(batch, n_heads, n_heads)` with
    heads in the order of the table; tiles, as in `Atlas.tiles`."""

    pairs: dict[str, np.ndarray] = field(default_factory=dict)
    tiles: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Tables:
    """What has been measured on so many samples, averaged over them: as in the Atlas."""

    samples: int
    heads: dict[str, np.ndarray]
    layers: dict[str, np.ndarray]
    pairs: dict[str, np.ndarray]


class Instrument:
    """Base of all instruments; a new one is a class in a file of its own, listed in catalog.py.

    name: by which it is chosen. columns: the columns it fills, of heads or layers; those it does
    not return are NaN. stimulus: what it is measured on: "text" (the given input, whatever it
    is), "repeat", "needle" or "weights". version: to be raised when its numbers change, so that
    an interrupted run is not continued with other definitions.

    All methods are optional. A run calls start once, then for each batch begin, read and
    read_layer while the model runs, finish; and conclude once at the end.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    stimulus: ClassVar[str] = "text"
    version: ClassVar[int] = 1

    def start(self, view: ModelView, seed: int) -> None:
        """A run begins on this model."""

    def begin(self, batch: Batch) -> None:
        """A batch of this instrument's stimulus is about to run."""

    def read(self, reading: Reading) -> Numbers:
        """Numbers of one attention, column -> `(batch, heads)`."""
        return {}

    def read_layer(
        self, layer: LayerReading, batch: Batch
    ) -> Mapping[AttentionView | LayerView, Numbers]:
        """Numbers of the layer that has just run, and of attentions in it."""
        return {}

    def finish(self) -> Findings | None:
        """The batch has run: what is not a number of one head or layer."""
        return None

    def conclude(self, tables: Tables) -> None:
        """All samples are measured: add columns that follow from the means."""
