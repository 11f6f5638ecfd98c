"""Groups of query heads that have become unequal: which key-value head each one reads.

Attention functions know equal groups only: query head h reads key-value head h // group. Where
heads were removed from some groups and not from others, the cache and the projections hold the
key-value heads that are left, and between cache and attention function they are repeated as the
query heads need them, so that every function sees as many key-value heads as query heads.

The cache grows by nothing, but keys and values of all query heads are copied in each call, as eager
attention, and SDPA under a mask, do with equal groups too. Beside a model that lost as many heads
in equal groups (6 of 9 query heads on 3 left, 2,048 tokens, one thread) prefill took 4 % longer and
a decoded token 28 %: where decoding counts, remove as many query heads of every group.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.cached import CachedKeys
from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import READ

_CACHES = ("past_key_values", "layer_past")


def read_unequally(module: nn.Module, of: tuple[int, ...]) -> None:
    """From now on query head h of `module` reads key-value head of[h].

    Raises UnsupportedModelError for an attention that takes no cache by a name that is known.
    """
    caches_of(module)
    if not hasattr(module, READ):
        module.register_forward_pre_hook(_hand_over, with_kwargs=True)
    setattr(module, READ, of)


def read_equally(module: nn.Module) -> None:
    """Undo `read_unequally`."""
    if hasattr(module, READ):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _hand_over:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        delattr(module, READ)


def caches_of(module: nn.Module) -> str:
    """The name by which an attention takes its cache."""
    known = inspect.signature(type(module).forward).parameters
    for name in _CACHES:
        if name in known:
            return name
    raise UnsupportedModelError(
        f"{type(module).__name__} takes no cache, so that its key-value heads cannot be handed to "
        "unequal groups of query heads: remove as many query heads of every group"
    )


class Gathering:
    """A cache as one attention sees it: what `update` gives is repeated for the query heads.

    `inner`: the cache, None for a call without one.
    """

    def __init__(self, inner: Any, of: tuple[int, ...]) -> None:
        self._inner, self._of = inner, of

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keys and values `(batch, kv_heads, n, d)` to `(batch, heads, all so far, d)`."""
        if self._inner is not None:
            keys, values = self._inner.update(keys, values, *args, **kwargs)
        if isinstance(keys, CachedKeys):  # whoever answers for them knows the groups
            return keys, values
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
            raise UnsupportedModelError(
                f"{type(self._inner).__name__} does not hand over its keys and values as tensors, "
                "and this layer has unequal groups of query heads: remove as many query heads of "
                "every group, or use a cache of transformers"
            )
        index = torch.tensor(self._of, device=keys.device)
        return keys.index_select(1, index), values.index_select(1, index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    name = caches_of(module)
    place = list(inspect.signature(type(module).forward).parameters).index(name) - 1
    of = getattr(module, READ)
    if place < len(args):
        taken = Gathering(args[place], of)
        return (*args[:place], taken, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: Gathering(kwargs.get(name), of)}
