"""What an attention call says, as a cache can serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.maps import Full, KeyMask, Padding, Pattern, Window
from headwise.maps.pattern import And
from headwise.models.errors import UnsupportedModelError
from headwise.models.interface import Terms, interpret


@dataclass(frozen=True)
class Call:
    """`real`: `(batch, m)`, False for new tokens that are padding, None where none is. `causal`:
    the new tokens look at each other as causality alone says, with no padding among them."""

    terms: Terms
    real: Tensor | None
    scale: float

    @property
    def causal(self) -> bool:
        pattern = self.terms.pattern
        return self.real is None and (
            isinstance(pattern, Full) or (isinstance(pattern, Window) and pattern.left is None)
        )


def read(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    given: dict[str, Any],
    before: str,
    window: int | None,
) -> Call:
    """What a call of an attention with m new queries and keys means.

    Raises UnsupportedModelError where it is not the causal attention of a layer with that sliding
    `window` (None: without one), UnknownAttentionArgumentError for an unknown argument, ValueError
    for dropout.
    """
    name = type(module).__name__
    given = dict(given)
    if given.pop("dropout", 0.0) and module.training:
        raise ValueError(f"{name} drops out attention weights: call model.eval() first")
    m = query.shape[2]
    if keys.shape[2] != m or keys.shape[0] != query.shape[0]:
        raise UnsupportedModelError(
            f"{name} asks {tuple(query.shape)} queries of {tuple(keys.shape)} new keys, so that it "
            "is no self-attention. A HeadCache serves self-attentions: for an encoder-decoder "
            "hand over EncoderDecoderCache(HeadCache(model, ...), DynamicCache())"
        )
    terms = interpret(module, query, keys, mask, given.pop("scaling", None), given, before)
    if terms.bias is not None:
        raise UnsupportedModelError(
            f"{name} adds a bias to its scores, which depends on positions that a HeadCache may "
            "have let go of: it serves attentions without a bias"
        )
    core = _core(terms.pattern)
    alone = isinstance(core, Full) and m == 1
    if not alone and not (isinstance(core, Window) and core.right == 0 and _fits(core, m, window)):
        told = "" if window is None else f" with the window of {window} that its config names"
        raise UnsupportedModelError(
            f"{name} masks {m} new tokens by {core!r}; a HeadCache serves causal attention{told}"
        )
    real = None if terms.keys is None else terms.keys.expand(query.shape[0], m)
    scale = query.shape[-1] ** -0.5 if terms.scale is None else terms.scale
    return Call(terms, real, scale)


def _fits(core: Window, m: int, window: int | None) -> bool:
    """Whether a mask of m tokens can be that of a window. One that is not longer says nothing."""
    seen = m if core.left is None else core.left
    return min(seen, m) == (m if window is None else min(window, m))


def _core(pattern: Pattern) -> Pattern:
    """A pattern without the padding in it."""
    if isinstance(pattern, And):
        parts = [_core(part) for part in (pattern.a, pattern.b)]
        looks = [part for part in parts if not isinstance(part, Full)]
        return looks[0] if len(looks) == 1 else Full() if not looks else pattern
    return Full() if isinstance(pattern, Padding | KeyMask) else pattern


def places(start: int, m: int, batch: int, real: Tensor | None, device: torch.device) -> Tensor:
    """`(batch, m)` int32: the places of the new tokens, -1 where they are padding."""
    at = torch.arange(start, start + m, dtype=torch.int32, device=device).expand(batch, m)
    return at if real is None else at.masked_fill(~real, -1)
