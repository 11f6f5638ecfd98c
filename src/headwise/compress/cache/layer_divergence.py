"""What few bits in one layer's cache cost the model's predictions.

The error of a layer's heads (`cache_sensitivity`) is quick to measure and does not say what the
model makes of it: in one model two bits for keys cost a layer's heads less than two bits for
values, and its predictions many times more. So this measures predictions, in a cache that really
holds the bits; the answers fit into the same table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from headwise.compress.cache.head_cache import HeadCache
from headwise.compress.cache.layer_bits import PAIRS, Pair, Sensitivity, cached_attentions
from headwise.compress.cache.quantised import Coding
from headwise.instruments.examples import model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView


@torch.no_grad()
def cache_divergence(
    model: nn.Module | ModelView,
    inputs: Any,
    pairs: Sequence[Pair] = PAIRS,
    coding: Coding | None = None,
    **reading: Any,
) -> Sensitivity:
    """Mean KL in nats a token between the model's predictions and those with one layer's cache in
    few bits, for every layer and pair (bits of keys, bits of values).

    Of each text the first three quarters fill the cache, and the predictions of the last quarter
    count. `inputs`, `reading`: as for `read_examples`. coding: the rest of the coding. Raises
    ValueError for a text whose part in the cache fills no group.
    """
    look = model_view(model)
    net: Any = look.model
    base = coding or Coding()
    layers = len(cached_attentions(look))
    errors = torch.zeros(layers, len(pairs), dtype=torch.float64)
    tokens = 0
    with evaluating(net):
        for batch in read_examples(net, inputs, **reading):
            ids = batch.given["input_ids"]
            start = ids.shape[1] * 3 // 4
            if start < base.group + base.residual:
                raise ValueError(
                    f"of {ids.shape[1]} tokens {start} fill the cache, and none is coded before "
                    f"{base.group + base.residual}: give longer texts"
                )
            before = net(**batch.given).logits[:, start:].float().log_softmax(-1)
            tokens += before[..., 0].numel()
            for layer in range(layers):
                for n, (keys, values) in enumerate(pairs):
                    bits: list[Any] = [None] * layers
                    bits[layer] = replace(base, key_bits=keys, value_bits=values)
                    with HeadCache(net, bits=bits) as cache:
                        net(ids[:, :start], past_key_values=cache)
                        logits = net(ids[:, start:], past_key_values=cache).logits
                    after = logits.float().log_softmax(-1)
                    errors[layer, n] += (before.exp() * (before - after)).sum().cpu()
    return Sensitivity(tuple(pairs), (errors / tokens).clamp_min(0.0).numpy(), base)
