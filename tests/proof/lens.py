"""The same models in both libraries, for test_transformerlens.py.

A bridge changes the model it is given, so each library gets its own copy of the same weights.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.config import TransformerBridgeConfig
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 211


def sharpened(model: Any) -> Any:
    """Random weights large enough that the maps are far from even."""
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() == 2 and "emb" not in name and "wte" not in name:
                torch.nn.init.normal_(weights, std=1.5 * weights.shape[0] ** -0.5)
    return model.eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_positions": 192, "n_embd": 48, "n_layer": 3, "n_head": 4}
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    return sharpened(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **special)))


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=192,
        bos_token_id=0,
        eos_token_id=0,
    )
    return sharpened(LlamaForCausalLM(config))


RANDOM: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama}


def numerals(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for which the token 17 is written "17"; 0 begins and ends a text."""
    ids = {"<0>": 0} | {str(n): n for n in range(1, size)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>", pad_token="<0>")


def bridge(model: Any) -> Any:
    """A copy of a Hugging Face model in TransformerLens. Nothing is fetched: the name is taken
    for its own sake only."""
    name = {"gpt2": "gpt2", "llama": "llama-local"}[model.config.model_type]
    words = numerals(model.config.vocab_size)
    return TransformerBridge.boot_transformers(
        name, hf_model=copy.deepcopy(model), tokenizer=words, device="cpu"
    )


@torch.no_grad()
def filled(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A native model of TransformerLens with these weights; biases that are not given are 0."""
    lens = TransformerBridge.boot_native(TransformerBridgeConfig(**config))
    for name, parameter in lens.named_parameters():
        given = weights.pop(name.replace("._original_component", ""), None)
        parameter.zero_() if given is None else parameter.copy_(given)
    assert not weights, f"no place for {sorted(weights)}"
    return lens


def adjacent(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs side by side, where transformers keeps them half a head apart."""
    width = weight.shape[1]
    return weight.view(heads, 2, -1, width).transpose(1, 2).reshape(-1, width)


def native_llama(model: Any) -> Any:
    c = model.config
    given = dict(model.state_dict())
    named = {
        "tok_embed.weight": given["model.embed_tokens.weight"],
        "head.weight": given["lm_head.weight"],
        "ln_out.weight": given["model.norm.weight"],
    }
    parts = {
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.in": "mlp.up_proj",
        "mlp.out": "mlp.down_proj",
    }
    for layer in range(c.num_hidden_layers):
        at, to = f"model.layers.{layer}", f"layers.{layer}"
        for target, source in parts.items():
            named[f"{to}.{target}.weight"] = given[f"{at}.{source}.weight"]
        for part, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
            weight = given[f"{at}.self_attn.{part}_proj.weight"]
            named[f"{to}.attn.{part}.weight"] = adjacent(weight, heads)
    config = {
        "d_model": c.hidden_size,
        "d_head": c.head_dim,
        "n_layers": c.num_hidden_layers,
        "n_ctx": c.max_position_embeddings,
        "n_heads": c.num_attention_heads,
        "n_key_value_heads": c.num_key_value_heads,
        "d_vocab": c.vocab_size,
        "d_mlp": c.intermediate_size,
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "eps": c.rms_norm_eps,
        "positional_embedding_type": "rotary",
        "rotary_dim": c.head_dim,
        "rotary_base": 10000,
    }
    return filled(config, named)


def native_induction(weights: dict[str, Tensor]) -> Any:
    """The attention-only models of `load_induction.py`."""
    named = {
        "tok_embed.weight": weights["embed.W_E"],
        "pos.weight": weights["pos_embed.W_pos"],
        "head.weight": weights["unembed.W_U"].T,
    }
    for layer in range(2):
        for part in "QKV":
            of = f"blocks.{layer}.attn."
            named[f"layers.{layer}.attn.{part.lower()}.weight"] = weights[f"{of}W_{part}"][0].T
            named[f"layers.{layer}.attn.{part.lower()}.bias"] = weights[f"{of}b_{part}"][0]
        named[f"layers.{layer}.attn.o.weight"] = weights[f"{of}W_O"][0].T
        named[f"layers.{layer}.attn.o.bias"] = weights[f"{of}b_O"]
    config = {"d_model": 64, "d_head": 64, "n_layers": 2, "n_ctx": 8, "n_heads": 1, "d_vocab": 26}
    plain = {"attn_only": True, "normalization_type": None, "positional_embedding_type": "standard"}
    return filled(config | plain, named)
