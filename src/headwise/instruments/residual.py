"""The residual stream, layer by layer: how large it is, its peaks, and what is added to it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.instruments.batch import Batch
from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.models import AttentionView, LayerReading, LayerView

__all__ = ["Residual"]

_TOKENS = 4096  # that are subtracted at a time
_SAMPLED = 256  # tokens over which the median magnitude is taken


class Residual(Instrument):
    """Norms are per token, their means over real tokens. Massive activations (Sun et al. 2024,
    arXiv 2402.17762) show in the peak and in its ratio to the median magnitude, which is taken
    over at most 256 tokens, evenly spread. In models that normalise after adding (BERT), the
    stream after the layer is what the next one is given."""

    name = "residual"
    columns = columns(
        "residual_norm", "residual_peak", "residual_peak_ratio", "attention_share", "update_share"
    )

    def read_layer(
        self, layer: LayerReading, batch: Batch
    ) -> Mapping[AttentionView | LayerView, Numbers]:
        before, after = layer.residual_in, layer.residual_out
        rows = batch.valid.get(layer.layer.stack)
        if rows is not None:
            rows = rows.to(after.device) if rows.shape == after.shape[:2] else None

        def mean(x: Tensor) -> Tensor:
            if rows is None:
                return x.mean(-1)
            return x.masked_fill(~rows, 0.0).sum(-1) / rows.sum(-1)

        peak = torch.linalg.vector_norm(after, torch.inf, dim=-1, dtype=torch.float32)
        if rows is not None:
            peak = peak.masked_fill(~rows, 0.0)
        numbers = {
            "residual_norm": mean(_norm(after)),
            "residual_peak": peak.amax(-1),
            "residual_peak_ratio": peak.amax(-1) / _median(after, rows),
        }
        if before.shape == after.shape:
            parts = zip(before.split(_TOKENS, 1), after.split(_TOKENS, 1), strict=True)
            update = torch.cat([_norm(b.float() - a.float()) for a, b in parts], -1)
            numbers["update_share"] = mean(update / _norm(before).clamp_min(1e-30))
        if layer.attention_out is not None and layer.mlp_out is not None:
            attention, mlp = _norm(layer.attention_out), _norm(layer.mlp_out)
            if attention.shape == mlp.shape == peak.shape:
                numbers["attention_share"] = mean(attention / (attention + mlp).clamp_min(1e-30))
        return {layer.layer: numbers}


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _median(x: Tensor, rows: Tensor | None) -> Tensor:
    """Median magnitude of each sample `(batch,)`."""
    medians = []
    for number, sample in enumerate(x):
        real = sample if rows is None else sample[rows[number]]
        at = torch.linspace(0, len(real) - 1, min(_SAMPLED, len(real)), device=x.device).long()
        medians.append(real[at].abs().float().median())
    return torch.stack(medians)
