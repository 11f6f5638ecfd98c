"""What an observer is handed while the model runs. Tensors must not be kept: they are the
model's own, and keeping them keeps every layer's activations alive."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headwise.maps import AttentionMap
from headwise.models.structure import AttentionView, LayerView


@dataclass(frozen=True, eq=False)
class AttentionReading:
    """One call of one attention.

    `query` `(batch, heads, n_q, head_dim)`, `key` and `value` `(batch, kv_heads, n_k, ...)` as
    they enter the product: after rotary embedding, after query and key norms. (A model that
    scales its queries beforehand, as OPT and Whisper do, hands them over scaled, and its scale
    is 1.) `out` `(batch, heads, n_q, value_dim)`: the heads' outputs before the output projection.
    `map`: the attention map with the scale, mask, bias, soft-cap and sinks really used.
    `padding`: `(batch, n_k)`, True where a key is real, or None where nothing is padded or the
    model did not say.
    """

    attention: AttentionView
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    map: AttentionMap
    padding: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerReading:
    """One run of one layer, all tensors `(batch, n, width)`.

    `residual_in`, `residual_out`: the stream before and after. `attention_out`, `mlp_out`: what
    attention (self and cross together) and MLP add to it, None where the layer has no such part
    or it was not found. In pre-norm models the four sum up; in post-norm models (BERT, BART) the
    sums are normalised on the way.
    """

    layer: LayerView
    residual_in: Tensor
    residual_out: Tensor
    attention_out: Tensor | None
    mlp_out: Tensor | None
