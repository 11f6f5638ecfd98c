"""The language model that headwise carries, and text that it was not trained on, for claims."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from headwise.models.default import default_model_path, default_text


@cache
def embedded_model() -> Any:
    """The model in float32, not to be changed: 4 layers, 8 heads on 4 key-value heads of 32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model_path()).eval()


@cache
def embedded_text(count: int, tokens: int, skip: int = 0) -> Tensor:
    """Windows `(count, tokens)` of token ids, the first `skip` windows left out."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(default_model_path())
    text = default_text(6 * (skip + count) * tokens + 2000)[0]
    ids = torch.as_tensor(words(text, return_tensors="pt")["input_ids"][0])
    return ids[: (skip + count) * tokens].view(-1, tokens)[skip:]


@torch.no_grad()
def divergence(ids: Tensor, prefill: int, cache: Any) -> float:
    """Mean KL in nats a token between predictions without a cache and those of the tokens after
    the prefill with `cache`, which held the prefill by then."""
    model = embedded_model()
    want = model(ids, use_cache=False).logits[:, prefill:].float().log_softmax(-1)
    model(ids[:, :prefill], past_key_values=cache)
    got = model(ids[:, prefill:], past_key_values=cache).logits.float().log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1).mean())
