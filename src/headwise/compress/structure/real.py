"""Which tokens of an input are real: averages over calibration inputs leave padding out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def real_tokens(given: dict[str, Tensor], stack: str, shape: Sequence[int]) -> Tensor:
    """True where a token of `stack` is real, in `shape` `(batch, n)`, as far as the inputs say."""
    decoding = "decoder_input_ids" in given and stack == "decoder"
    mask = given.get("decoder_attention_mask" if decoding else "attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape.numel() == torch.Size(shape).numel():
        return mask.bool().reshape(tuple(shape))
    return torch.ones(tuple(shape), dtype=torch.bool)
