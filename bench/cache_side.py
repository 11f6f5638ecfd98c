"""One side of a comparison of caches: prefill, decoding, bytes and peak, measured in one process.

Needs nothing but torch, so that an environment with other packages can run it too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import measure

Prefill = Callable[[Tensor], tuple[Any, Tensor]]
"""Tokens `(1, n)` -> the cache and the logits of the last token."""


@torch.no_grad()
def run(
    model: Any,
    ids: Tensor,
    decode: int,
    repeats: int,
    prefill: Prefill,
    held: Callable[[Any], int],
    clock: Callable[[], float],
) -> tuple[dict[str, Any], Any]:
    """Median seconds of prefill and milliseconds for a decoded token (the first is left out), bytes
    that the cache holds after prefill (`held(cache)`), the largest memory beyond what was
    held before, and the tokens decoded; and a cache after prefill."""
    prefill(ids[:, : min(256, ids.shape[1])])  # warm
    gc.collect()
    before = measure.peak_bytes() if measure.forget_peak() else 0
    fill, step, live = [], [], 0
    words: list[int] = []
    for _ in range(repeats):
        gc.collect()
        start = clock()
        cache, logits = prefill(ids)
        fill.append(clock() - start)
        live, words = held(cache), []
        for number in range(decode):
            word = logits.argmax(-1).reshape(1, 1)
            words.append(int(word))
            at = torch.tensor([[ids.shape[1] + number]])
            start = clock()
            logits = model(word, past_key_values=cache, position_ids=at).logits[:, -1]
            if number:
                step.append(clock() - start)
        del cache
    peak = measure.peak_bytes() - before
    return {
        "prefill": measure.median(fill),
        "token": 1e3 * measure.median(step),
        "live": live,
        "peak": peak,
        "words": words,
    }, prefill(ids)[0]


def clock_of(name: str) -> Callable[[], float]:
    """`wall`, or `cpu`: processor time, for a machine that has other work and one thread here."""
    return time.process_time if name == "cpu" else time.perf_counter


def load(folder: str) -> Any:
    """A causal model of transformers, float32, with torch's own attention."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()
