"""The attention-only induction models as a Hugging Face GPT-2, exactly.

GPT-2 has norms and MLPs, these models have none: the norms become identities and the MLPs add
zero, which is not a config, but is a GPT2LMHeadModel that runs GPT-2's own attention.
"""

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.proof.nothing import Nothing


@torch.no_grad()
def as_gpt2(weights: dict[str, Tensor], **settings: str) -> GPT2LMHeadModel:
    """weights: as `load_induction.load` gives them (one head of 64, two layers, 26 letters)."""
    letters, width = weights["embed.W_E"].shape
    config = GPT2Config(
        vocab_size=letters,
        n_positions=len(weights["pos_embed.W_pos"]),
        n_embd=width,
        n_layer=2,
        n_head=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    model = GPT2LMHeadModel(config)
    body = model.transformer
    body.wte.weight.copy_(weights["embed.W_E"])
    body.wpe.weight.copy_(weights["pos_embed.W_pos"])
    body.ln_f = nn.Identity()
    for layer, block in enumerate(body.h):
        of = {name: weights[f"blocks.{layer}.attn.{name}"] for name in ("W_O", "b_O")}
        parts = [weights[f"blocks.{layer}.attn.W_{name}"][0] for name in "QKV"]
        biases = [weights[f"blocks.{layer}.attn.b_{name}"][0] for name in "QKV"]
        block.attn.c_attn.weight.copy_(torch.cat(parts, 1))
        block.attn.c_attn.bias.copy_(torch.cat(biases))
        block.attn.c_proj.weight.copy_(of["W_O"][0])
        block.attn.c_proj.bias.copy_(of["b_O"])
        block.ln_1, block.ln_2, block.mlp = nn.Identity(), nn.Identity(), Nothing()
    model.lm_head = nn.Linear(width, letters)
    model.lm_head.weight.copy_(weights["unembed.W_U"].T)
    model.lm_head.bias.copy_(weights["unembed.b_U"])
    return model.eval()
