"""An attention's four weights with the linear parts of the norms around them folded in.

Folded: gains and centring of the norm that feeds the attention, of the norms of queries and keys,
and of a norm or scale between the attention and the residual. Division by a norm's size is not
linear and stays out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.instruments.gains import Gain, find_gain
from headwise.models import UnsupportedModelError
from headwise.models.structure import AttentionView, LayerView, ModelView

__all__ = [
    "attention_at",
    "input_gain",
    "layer_of",
    "query_and_key",
    "query_and_key_bias",
    "value_and_output",
    "value_bias",
]

_KEY_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_norm", "key_norm"))


def attention_at(
    view: ModelView, layer: int, stack: str | None = None, kind: str = "self"
) -> AttentionView:
    """The attention of a layer. Raises ValueError where there is none, or several to choose from;
    `stack` must be said where the model has several."""
    if stack is None and len(view.stacks) > 1:
        raise ValueError(f"the model has the stacks {', '.join(view.stacks)}; say stack= which")
    stack = stack or view.stacks[0]
    found = [a for a in view.attentions if a.stack == stack and a.kind == kind]
    for attention in found:
        if attention.layer == layer:
            return attention
    held = sorted({a.layer for a in found})
    raise ValueError(
        f"no {kind}-attention in layer {layer} of stack {stack!r}; expected "
        + (f"one of {held}" if held else f"stacks {', '.join(view.stacks)}, kinds self and cross")
    )


def layer_of(view: ModelView, attention: AttentionView) -> LayerView | None:
    """The layer that an attention stands in, None where it is in none that was found."""
    return next((one for one in view.layers if any(a is attention for a in one.attentions)), None)


def input_gain(attention: AttentionView, width: int) -> Gain:
    """The norm in front of keys and values of `width`; of queries too in self-attention.

    Raises UnsupportedModelError for a norm with no linear part.
    """
    # keys and values of cross-attention come from the encoder, past this norm
    return _known(find_gain(None if attention.kind == "cross" else attention.norm, width))


def query_and_key(
    attention: AttentionView, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """W_Q `(heads, head_dim, width)` and W_K `(kv_heads, head_dim, in_width)`.

    Raises UnsupportedModelError where weights or gains are not known.
    """
    query, key = attention.query_weight().detach(), attention.key_weight().detach()
    of_query, of_key = _key_norms(attention)
    before = _known(find_gain(attention.norm, query.shape[-1]))
    return (
        before.into_input(_normed(of_query, query.to(dtype))),
        input_gain(attention, key.shape[-1]).into_input(_normed(of_key, key.to(dtype))),
    )


def query_and_key_bias(
    attention: AttentionView, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """What is added to every query `(heads, head_dim)` and key `(kv_heads, head_dim)`: the bias of
    the norm in front, seen through the projection, and the projection's own; zeros for none.

    Raises UnsupportedModelError as `query_and_key`.
    """
    query, key = attention.query_weight().detach(), attention.key_weight().detach()
    of_query, of_key = _key_norms(attention)
    before = _known(find_gain(attention.norm, query.shape[-1]))
    behind = input_gain(attention, key.shape[-1])
    return (
        _normed(of_query, _constant(query, before, attention.query_bias(), dtype))[..., 0],
        _normed(of_key, _constant(key, behind, attention.key_bias(), dtype))[..., 0],
    )


def value_and_output(
    view: ModelView, attention: AttentionView, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """W_V `(kv_heads, value_dim, in_width)` and W_O `(heads, width, value_dim)`.

    Raises UnsupportedModelError where weights or gains are not known.
    """
    output = attention.output_weight().detach().to(dtype)
    output = _output_gain(view, attention, output.shape[-2]).after_output(output)
    value = attention.value_weight().detach().to(dtype)
    return input_gain(attention, value.shape[-1]).into_input(value), output


def value_bias(attention: AttentionView, dtype: torch.dtype = torch.float64) -> Tensor:
    """What is added to every value `(kv_heads, value_dim)`, as in `query_and_key_bias`."""
    value = attention.value_weight().detach()
    before = input_gain(attention, value.shape[-1])
    return _constant(value, before, attention.value_bias(), dtype)[..., 0]


def _constant(weight: Tensor, before: Gain, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(heads, d, 1)`: what stands where the input is zero behind the norm's gain."""
    weight = weight.to(dtype)
    found = weight.new_zeros(weight.shape[:2]) if bias is None else bias.detach().to(dtype)
    if before.bias is not None:
        found = found + weight @ before.bias.to(weight)
    return found[..., None]


def _output_gain(view: ModelView, attention: AttentionView, width: int) -> Gain:
    """What stands between the attention's output and the residual, a gain of one if nothing."""
    layer = layer_of(view, attention)
    after = None
    if (
        layer is not None
        and len(layer.attention_ends) == 1
        and not isinstance(attention.projections, str)
    ):
        (end,) = layer.attention_ends
        after = None if end in (attention.module, attention.projections.output) else end
    return _known(find_gain(after, width))


def _key_norms(attention: AttentionView) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms of queries and of keys, where the attention has both."""
    for names in _KEY_NORMS:
        of_query, of_key = (getattr(attention.module, name, None) for name in names)
        if isinstance(of_query, nn.Module) and isinstance(of_key, nn.Module):
            return of_query, of_key
    return None, None


def _normed(norm: nn.Module | None, weight: Tensor) -> Tensor:
    """W (heads, d, ...) with a norm over each head behind it, or over all heads together."""
    per_head = find_gain(norm, weight.shape[1])
    if isinstance(per_head, Gain):
        return per_head.after_output(weight)
    flat = weight.flatten(0, 1)
    return _known(find_gain(norm, len(flat))).after_output(flat).view_as(weight)


def _known(gain: Gain | str) -> Gain:
    if isinstance(gain, str):
        raise UnsupportedModelError(gain)
    return gain
