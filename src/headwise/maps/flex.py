"""FlexAttention as a backend: compiled for the pattern, quick where it is sparse.

On a CPU it compiles (some seconds, once for each pattern and shape) and is for inference only: it
returns no log-sum-exp and has no gradients there. On CUDA it returns both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from headwise.maps.scores import Scores


def why_not(scores: Scores, gradients: bool, need_lse: bool) -> str | None:
    """None where FlexAttention serves, otherwise the reason why not."""
    if scores.bias is not None and isinstance(scores.bias, Tensor) is False:
        return "a bias given by position is not passed to FlexAttention"
    if scores.sinks is not None:
        return "learned sinks need the log-sum-exp, which FlexAttention has on CUDA only"
    if scores.device.type == "cpu":
        if gradients:
            return "FlexAttention has no gradients on the CPU"
        if need_lse:
            return "FlexAttention returns no log-sum-exp on the CPU"
        if scores.q.dtype == torch.float64:
            return "FlexAttention does not take float64 on the CPU"
    return None


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(scores: Scores, v: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out `(batch, heads, n_q, d_v)`; lse `(batch, heads, n_q)` on CUDA, None on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(
        scores.pattern.mask_mod(scores.n_q, scores.n_k),
        scores.batch if scores.pattern.by_batch else None,
        None,
        scores.n_q,
        scores.n_k,
        device=str(scores.device),
    )
    cap, bias = scores.softcap, scores.bias

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        if isinstance(bias, Tensor):
            table = bias.expand(scores.batch, scores.heads, scores.n_q, scores.n_k)
            s = s + table[b, h, i, j]
        return s

    options: dict[str, Any] = {
        "score_mod": score_mod if cap is not None or bias is not None else None,
        "block_mask": block_mask,
        "scale": scores.scale,
        "enable_gqa": scores.group > 1,
    }
    if scores.device.type == "cpu":
        return _compiled()(scores.q, scores.k, v, **options), None
    out, lse = _compiled()(scores.q, scores.k, v, return_lse=True, **options)
    return out, lse
