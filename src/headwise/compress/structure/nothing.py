"""What stands where an attention or a feed-forward part was: it computes nothing."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from headwise.parts.mixer import Mixer
from headwise.parts.state import State


class NoAttention(nn.Module):
    """In the place of an attention of transformers that lost all its heads.

    It gives its bias `(width,)` for every token, or zeros; `width` 0 where the output projection
    stands outside and adds the bias itself (BERT). `returns`: how many things the attention gave.
    `layer_idx`: as the attention's; in a cache it leaves one zero a token for keys and one for
    values, because the length of a whole cache is asked of single layers.
    """

    def __init__(
        self, width: int, returns: int, layer_idx: int | None, bias: Tensor | None, cached: bool
    ) -> None:
        super().__init__()
        self.width, self.returns, self.layer_idx, self.cached = width, returns, layer_idx, cached
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states `(batch, n, width)`; everything else is looked at for a cache only."""
        past = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if self.cached and past is not None and self.layer_idx is not None:
            past = getattr(past, "self_attention_cache", past)
            batch, n = hidden_states.shape[:2]
            empty = hidden_states.new_zeros(batch, 1, n, 1)
            past.update(empty, empty, self.layer_idx)
        shape = (*hidden_states.shape[:-1], self.width)
        out = hidden_states.new_zeros(shape)
        out = out if self.bias is None else out + self.bias  # no view: others may write into it
        if self.returns == 1:
            return out
        # T5 hands the bias on from layer to layer through what its attentions return
        more: list[Any] = [kwargs.get("position_bias"), *[None] * self.returns]
        return (out, *more[: self.returns - 1]) if self.returns > 2 else (out, None)


class NoFeedForward(nn.Module):
    """In the place of a feed-forward part: its output bias for every token, or zeros. `returns`:
    how many things the part gave; beside the output there is nothing (no router chose).
    `residual`: which of the arguments beside the first is the residual, for a part that adds it
    itself (BLOOM, MPT); -1 for all others."""

    def __init__(self, bias: Tensor | None = None, returns: int = 1, residual: int = -1) -> None:
        super().__init__()
        self.returns, self.residual = returns, residual
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, part: nn.Module, returns: int = 1) -> NoFeedForward:
        """For this feed-forward part, without a bias."""
        known = list(inspect.signature(type(part).forward).parameters)
        at = known.index("residual") - 2 if "residual" in known else -1
        return cls(None, returns, at).train(part.training)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = torch.zeros_like(hidden_states)
        if self.residual >= 0:
            given = args[self.residual] if self.residual < len(args) else kwargs["residual"]
            out = out + given
        out = out if self.bias is None else out + self.bias
        return out if self.returns == 1 else (out, *[None] * (self.returns - 1))


class NoMixer(Mixer):
    """In the place of a mixer of our own: its output bias for every token, or zeros."""

    def __init__(self, dim: int, causal: bool, bias: Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.causal = dim, causal
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        if state is not None:
            state.seen += x.shape[1]
        out = torch.zeros_like(x)
        return out if self.bias is None else out + self.bias

    def state_bytes(self, n: int, itemsize: int = 4) -> int:
        return 0

    def flops(self, n: int) -> int:
        return 0
