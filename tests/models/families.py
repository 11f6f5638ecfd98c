"""Small random models of every supported family, built offline from a config.

`FAMILIES[name]()` gives the model in evaluation mode with eager attention; `inputs(model)` gives
a batch of two for it. Sizes are odd on purpose (heads unlike layers, head_dim unlike heads), so
that a mixed-up axis cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

LENGTH = 11
VOCABULARY = 61
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 40,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def build(model: str, config: str, /, implementation: str = "eager", **settings: Any) -> Any:
    """The named class with a config of the named class, from a fixed seed."""
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    made._attn_implementation = implementation
    built = getattr(transformers, model)(made).eval()
    with torch.no_grad():
        for name, weights in built.named_parameters():
            # fresh models have tiny weights: their maps would be uniform, and any error invisible
            if weights.dim() >= 2 and "embed" not in name:
                torch.nn.init.normal_(weights, std=1.3 * weights.shape[-1] ** -0.5)
            elif weights.dim() == 1 and "norm" not in name.lower():
                torch.nn.init.normal_(weights, std=0.2)
    return built


def family(model: str, config: str, base: dict[str, Any], **settings: Any) -> Callable[..., Any]:
    def make(implementation: str = "eager", **more: Any) -> Any:
        return build(model, config, implementation, **{**base, **settings, **more})

    return make


def without(base: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in base.items() if key not in names}


def clip(implementation: str = "eager", **more: Any) -> Any:
    text = without(ENCODER, "pad_token_id") | {"projection_dim": 24, "eos_token_id": 2}
    vision = VISION | {"projection_dim": 24, "num_hidden_layers": 2}
    return build(
        "CLIPModel",
        "CLIPConfig",
        implementation,
        text_config=text,
        vision_config=vision,
        projection_dim=24,
        **more,
    )


DECODERS: dict[str, Callable[..., Any]] = {
    "gpt2": family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 64},
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt_neox": family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        without(DECODER, "num_key_value_heads", "head_dim"),
        rotary_pct=0.4,
    ),
    "opt": family(
        "OPTForCausalLM",
        "OPTConfig",
        without(ENCODER, "intermediate_size"),
        ffn_dim=48,
        word_embed_proj_dim=40,
    ),
    "llama": family("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama_mqa": family("LlamaForCausalLM", "LlamaConfig", DECODER, num_key_value_heads=1),
    "gpt_bigcode": family(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"vocab_size": VOCABULARY, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "gpt_bigcode_mha": family(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"vocab_size": VOCABULARY, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 64},
        multi_query=False,
    ),
    "mistral": family("MistralForCausalLM", "MistralConfig", DECODER, sliding_window=4),
    "qwen2": family("Qwen2ForCausalLM", "Qwen2Config", without(DECODER, "head_dim")),
    "qwen2_window": family(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        without(DECODER, "head_dim"),
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": family("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "gemma2": family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER,
        sliding_window=4,
        query_pre_attn_scalar=30,
        attn_logit_softcapping=5.0,
    ),
    "gemma3": family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        DECODER,
        sliding_window=4,
        query_pre_attn_scalar=30,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": family("Phi3ForCausalLM", "Phi3Config", without(DECODER, "head_dim")),
    "olmo2": family("Olmo2ForCausalLM", "Olmo2Config", without(DECODER, "head_dim")),
    "gpt_oss": family(
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER,
        sliding_window=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        # its default (yarn) scales queries and keys even at position 0
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}

ENCODERS: dict[str, Callable[..., Any]] = {
    "bert": family("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": family("RobertaForMaskedLM", "RobertaConfig", ENCODER),
    "distilbert": family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 40, "hidden_dim": 48, "n_layers": 3, "n_heads": 4},
        pad_token_id=0,
    ),
    "albert": family("AlbertForMaskedLM", "AlbertConfig", ENCODER, embedding_size=24),
    "albert_groups": family(
        "AlbertForMaskedLM",
        "AlbertConfig",
        ENCODER,
        embedding_size=24,
        num_hidden_layers=4,
        num_hidden_groups=2,
    ),
    "modernbert": family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        ENCODER,
        local_attention=6,
        global_attn_every_n_layers=2,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "electra": family("ElectraForMaskedLM", "ElectraConfig", ENCODER, embedding_size=24),
}

VISIONS: dict[str, Callable[..., Any]] = {
    "vit": family("ViTForImageClassification", "ViTConfig", VISION),
    "deit": family("DeiTForImageClassification", "DeiTConfig", VISION),
    "dinov2": family(
        "Dinov2ForImageClassification", "Dinov2Config", without(VISION, "intermediate_size")
    ),
}

ENCODER_DECODERS: dict[str, Callable[..., Any]] = {
    "t5": family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 40, "d_kv": 6, "d_ff": 48, "num_heads": 4},
        num_layers=2,
        num_decoder_layers=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    ),
    "bart": family("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "marian": family("MarianMTModel", "MarianConfig", SEQ2SEQ),
    "whisper": family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        without(SEQ2SEQ, "forced_eos_token_id", "max_position_embeddings"),
        num_mel_bins=8,
        max_source_positions=9,
        max_target_positions=64,
    ),
    "moonshine": family(
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 48},
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=3,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        partial_rotary_factor=0.8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
}

FAMILIES: dict[str, Callable[..., Any]] = {
    **DECODERS,
    **ENCODERS,
    **VISIONS,
    "clip": clip,
    **ENCODER_DECODERS,
}

PRE_NORM = [
    name
    for name in FAMILIES
    if name
    not in ("bert", "roberta", "distilbert", "albert", "albert_groups", "electra", "bart", "marian")
]
"""Families whose layers add to the residual without normalising the sum."""

TEXTS = [*DECODERS, *ENCODERS, "clip", "t5", "bart", "marian"]
"""Families whose inputs are token ids with a 2-D padding mask."""


def attentions(name: str, output: Any) -> dict[tuple[str, str], Any]:
    """The matrices that a model returned itself, by (stack, kind)."""
    if name == "clip":
        return {
            ("text", "self"): output.text_model_output.attentions,
            ("vision", "self"): output.vision_model_output.attentions,
        }
    if name in ENCODER_DECODERS:
        return {
            ("encoder", "self"): output.encoder_attentions,
            ("decoder", "self"): output.decoder_attentions,
            ("decoder", "cross"): output.cross_attentions,
        }
    return {("decoder" if name in DECODERS else "encoder", "self"): output.attentions}


def scores(output: Any) -> torch.Tensor:
    """The first floating-point tensor of an output: logits, or what stands for them."""
    return next(
        t for t in output.to_tuple() if isinstance(t, torch.Tensor) and t.is_floating_point()
    )


def inputs(model: Any, length: int = LENGTH, padding: str | None = None) -> dict[str, Any]:
    """A batch of two for `model`; padding "left" or "right" makes the second one shorter."""
    random = torch.Generator().manual_seed(7)
    kind = model.config.model_type
    ids = torch.randint(3, VOCABULARY, (2, length), generator=random)
    mask = torch.ones_like(ids)
    if padding is not None:
        hidden = slice(0, 3) if padding == "left" else slice(length - 3, length)
        ids[1, hidden], mask[1, hidden] = 0, 0
    text = {"input_ids": ids} | ({} if padding is None else {"attention_mask": mask})
    if kind == "clip":
        ids[:, -1] = 2  # the end-of-text token that the tower pools at
        return text | {"pixel_values": torch.randn(2, 3, 12, 12, generator=random)}
    if kind == "whisper":
        features = torch.randn(2, 8, 18, generator=random)
        return {"input_features": features, "decoder_input_ids": ids[:, :7]}
    if kind == "moonshine":
        return {
            "input_values": torch.randn(2, 2000, generator=random),
            "decoder_input_ids": ids[:, :7],
        }
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=random)}
    if getattr(model.config, "is_encoder_decoder", False):
        return text | {"decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=random)}
    return text
