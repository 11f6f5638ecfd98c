"""How models name their parts: the tables that structural discovery reads.

Nothing here is a list of supported models. A model whose parts carry any of these names is
found by them; what no name can tell stands in the quirks at the end, by model type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
    ("Wq", "Wk", "Wv"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
"""Children of an attention that project queries, keys and values one by one."""

FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "to_qkv")
"""Children that project all three at once: queries, then keys, then values."""

FUSED_WITHOUT_RULE = frozenset({"query_key_value"})
"""Names of fused projections whose layout differs between models: known for FUSED_BY_HEAD only."""

QUERY_AND_FUSED_KEY_VALUE = (("q_attn", "c_attn"), ("q_proj", "kv_proj"))
"""Children where the query stands alone and key and value are fused (cross-attention)."""

OUTPUT = (
    "o_proj",
    "out_proj",
    "out_lin",
    "c_proj",
    "linear_out",
    "Wo",
    "wo",
    "to_out",
    "dense",
    "proj",
    "projection",
    "projection_layer",
    "output",
    "out",
    "o",
)
"""Children that map the heads' outputs back to the residual width."""

OUTPUT_BESIDE = ("output.dense",)
"""The same, beside the attention under its parent (BERT keeps it there)."""

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "h", "nhead")
KEY_VALUE_HEADS = ("num_key_value_heads", "kv_heads", "num_kv_heads", "n_kv_heads")
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "qk_head_dim")
"""Attributes of the attention, or of its config, that give the counts."""

NORMS_BEFORE = (
    "input_layernorm",
    "ln_1",
    "ln1",
    "n1",
    "norm1",
    "layer_norm1",
    "layernorm_before",
    "attn_norm",
    "attention_norm",
    "self_attn_layer_norm",
    "operator_norm",
    "layer_norm",
)
"""Children of a layer (or sub-layer) that feed its self-attention."""

NORMS_BEFORE_CROSS = (
    "encoder_attn_layer_norm",
    "ln_cross_attn",
    "layer_norm",
    "post_attention_layernorm",
)
"""The same for cross-attention."""

NORMS_AFTER = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("layer_scale1", "layer_scale2"),
)
"""Children that stand between attention and MLP and the residual they are added to."""

MLPS = ("mlp", "feed_forward", "ffn", "ff", "DenseReluDense", "block_sparse_moe", "moe")
MLP_ENDS = ("output.dense", "fc2", "ffn_output", "linear2")
"""The MLP as one module, and the last projection of one that is spread over the layer."""

DOWN = (
    "down_proj",
    "down",
    "c_proj",
    "dense_4h_to_h",
    "fc2",
    "wo",
    "w2",
    "lin2",
    "linear2",
    "output.dense",
    "ffn_output",
    "fc_out",
    "Wo",
)
"""The last projection of a feed-forward part, below the MLP or below the layer."""

FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "final_norm",
    "layernorm",
    "layer_norm",
    "post_layernorm",
    "hn",
)
"""Children beside a list of layers that normalise what the last one gives."""

CROSS = ("crossattention", "cross_attn", "cross_attention", "encoder_attn", "EncDecAttention")
"""Parts of a path that say cross-attention."""

NORM_AFTER_ADDING = frozenset({"bart", "marian", "blenderbot-small", "plbart", "bigbird_pegasus"})
"""Model types where a norm named as in NORMS_BEFORE follows the sum instead of feeding the
attention."""

FUSED_BY_HEAD = frozenset({"gpt_neox", "gpt_neox_japanese", "persimmon", "bloom"})
"""Model types whose fused projection is laid out head by head, (heads, 3, head_dim), and not
part by part. GPTBigCode joins them when it is not multi-query."""

FUSED_OTHERWISE = frozenset({"codegen"})
"""Model types whose fused projection is laid out in a way of their own."""

WINDOWED = frozenset({"swin", "swinv2", "donut-swin", "maskformer-swin", "clap_audio_model"})
"""Model types that fold image windows into the batch before they attend: what their attention
calls batch is (batch x windows), its positions are positions inside a window (shifted in every
other layer), and its stages differ in width and length."""


def _albert(config: Any) -> list[tuple[int, int]]:
    per_group = config.num_hidden_layers / config.num_hidden_groups
    return [
        (int(layer / per_group), inner)
        for layer in range(config.num_hidden_layers)
        for inner in range(config.inner_group_num)
    ]


SHARED_LAYERS: dict[str, Callable[[Any], list[tuple[int, int]]]] = {"albert": _albert}
"""Model types that run the same layer several times: config -> (group, layer in it) by call."""
