"""What may stand before a prompt, so that a key is the subject's own and not its first place's."""

from __future__ import annotations

from typing import Any

import torch

from headwise.edits.at_rest import at_rest, device_of
from headwise.edits.fact_prompts import encode
from headwise.models import ModelView
from headwise.models.prefix import logits_of

BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
"""Words that generated texts begin with, in turn."""


@torch.no_grad()
def generated_prefixes(
    view: ModelView, tokenizer: Any, count: int = 5, tokens: int = 8, seed: int = 0, top: int = 5
) -> list[str]:
    """`count` short texts of about `tokens` tokens drawn from the model itself, each ended with a
    full stop: at every place one of the `top` likeliest tokens, by their probabilities, seeded.

    Raises ValueError for a tokenizer that cannot decode.
    """
    if not hasattr(tokenizer, "decode"):
        raise ValueError("the tokenizer has no decode(ids): give prefixes= as texts")
    generator = torch.Generator().manual_seed(seed)
    found = []
    with at_rest(view.model):
        for n in range(count):
            ids = encode(tokenizer, BEGINNINGS[n % len(BEGINNINGS)])
            for _ in range(tokens):
                line = torch.tensor([ids], device=device_of(view.model))
                logits = logits_of(view.model(input_ids=line))[0, -1].float().cpu()
                best = logits.topk(min(top, len(logits)))
                drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
                ids.append(int(best.indices[drawn]))
            text = " ".join(tokenizer.decode(ids).split()).replace("{}", "")
            found.append(text.rstrip(".") + ".")
    return found
