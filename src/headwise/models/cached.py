"""Keys that only their cache can attend to.

A cache whose layers are ragged has no tensor of keys to return. What its `update` returns is the
new keys as `CachedKeys`: to the model's code a tensor with their shape and type, to our attention
the cache itself, which attends to all that it holds. Code that computes with it is told so: a
result from the new keys alone would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headwise.models.errors import UnsupportedModelError

_ABOUT = frozenset({"__get__", "size", "dim", "numel", "stride", "is_floating_point", "__len__"})


class Serving(Protocol):
    """A layer of a cache that attends by itself."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        value: Tensor,
        mask: Tensor | None,
        given: dict[str, Any],
        before: str,
    ) -> Tensor:
        """`(batch, n_q, heads, d_v)` for queries `(batch, heads, n_q, d)`, the values that
        `update` returned, and the arguments that the model's own attention, named `before`,
        would have been given."""
        ...


class CachedKeys(Tensor):
    """New keys `(batch, kv_heads, n, d)` of a layer of a cache, which answers for all keys."""

    layer: Serving

    @staticmethod
    def of(keys: Tensor, layer: Serving) -> CachedKeys:
        made = keys.as_subclass(CachedKeys)
        made.layer = layer
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                answer = func(*args, **(kwargs or {}))
            if not isinstance(answer, Tensor):
                return answer
        raise UnsupportedModelError(
            f"{getattr(func, '__name__', func)} was called with keys that a HeadCache holds. Only "
            "the attention of the model that the cache was made for can read them: is it another "
            "model, was the cache closed, or does this model compute with its cached keys?"
        )
