"""What a head's values and its output weigh: drained sinks, and its share in the residual."""

from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.instruments.batch import Batch
from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.instruments.reading import Reading
from headwise.models import (
    AttentionView,
    LayerReading,
    LayerView,
    ModelView,
    UnsupportedModelError,
)

__all__ = ["Values"]

_TOKENS = 4096  # whose outputs are multiplied at a time


class Values(Instrument):
    """`value_drain` is NaN for a head without sinks on this input. `residual_share` takes what
    W_O makes of the head's output, before a norm that some models put behind it, against the
    residual stream that enters the layer.

    |W_O o| comes from the Gram matrix W_O^T W_O (head_dim by head_dim), formed once a head: the
    contribution itself, as wide as the model for every head, is never formed.
    """

    name = "values"
    columns = columns("value_drain", "residual_share")

    def start(self, view: ModelView, seed: int) -> None:
        self._grams: dict[int, Tensor | None] = {}
        self._written: dict[AttentionView, tuple[Tensor, Tensor | None]] = {}

    def begin(self, batch: Batch) -> None:
        self._written.clear()

    def read(self, reading: Reading) -> Numbers:
        norms = self._norms(reading)
        if norms is not None:
            self._written[reading.attention] = norms, reading.rows
        return {"value_drain": value_drain(reading)}

    def read_layer(
        self, layer: LayerReading, batch: Batch
    ) -> Mapping[AttentionView | LayerView, Numbers]:
        stream = torch.linalg.vector_norm(layer.residual_in, dim=-1, dtype=torch.float32)
        found: dict[AttentionView | LayerView, Numbers] = {}
        for attention in layer.layer.attentions:
            norms, rows = self._written.pop(attention, (None, None))
            if norms is None or norms.shape[-1] != stream.shape[-1]:
                continue
            share = norms / stream[:, None].clamp_min(1e-30)
            if rows is None:
                found[attention] = {"residual_share": share.mean(-1)}
            else:
                share = share.masked_fill(~rows[:, None], 0.0)
                found[attention] = {"residual_share": share.sum(-1) / rows.sum(-1)[:, None]}
        return found

    def _norms(self, reading: Reading) -> Tensor | None:
        """|W_O o_i| of every head and query `(batch, heads, n_q)`; None where W_O is not known."""
        gram = self._gram(reading.attention)
        if gram is None or gram.shape[-1] != reading.out.shape[-1]:
            return None
        squares = [
            ((part @ gram) * part).sum(-1)
            for part in (p.to(gram.dtype) for p in reading.out.split(_TOKENS, 2))
        ]
        return torch.cat(squares, -1).clamp_min(0).sqrt()

    def _gram(self, attention: AttentionView) -> Tensor | None:
        key = id(attention.module)
        if key not in self._grams:
            try:
                weight = attention.output_weight().detach().float()
                self._grams[key] = weight.mT @ weight
            except UnsupportedModelError:
                self._grams[key] = None
        return self._grams[key]


def value_drain(reading: Reading) -> Tensor:
    """Mean norm of the values at the head's sinks over that of its other values
    `(batch, heads)`; NaN without sinks."""
    norms = torch.linalg.vector_norm(reading.value, dim=-1, dtype=torch.float32)
    norms = norms.repeat_interleave(reading.attention.heads // norms.shape[1], 1)
    sinks = reading.sinks
    others = ~sinks
    if reading.keys is not None:
        sinks, others = (mask & reading.keys[:, None] for mask in (sinks, others))
    at_sinks = (norms * sinks).sum(-1) / sinks.sum(-1)  # 0 / 0 is NaN: no sinks
    elsewhere = (norms * others).sum(-1) / others.sum(-1)
    return at_sinks / elsewhere
