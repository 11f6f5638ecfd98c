"""Decoding with maps that layers share: the source's cached keys serve all, and the layers that
look through its map cache their values alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from headwise.models.errors import UnsupportedModelError

NAMES = ("past_key_values", "layer_past")
"""By which attentions take their cache."""


class ValuesLayer(DynamicLayer):
    """A layer of a cache whose keys have no width: as long as its values are."""

    def get_seq_length(self) -> int:
        return 0 if self.values is None else int(self.values.shape[-2])


class Heard:
    """Keys as the source's attention got them from its cache in this pass, until each of the
    `readers` layers that share them had them."""

    def __init__(self) -> None:
        self.readers, self.left = 0, 0
        self.keys: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"readers": self.readers, "left": 0, "keys": None}

    def hear(self, keys: Tensor) -> None:
        self.keys, self.left = keys, self.readers

    def tell(self) -> Tensor:
        keys = self.keys
        if keys is None:
            raise RuntimeError("the layer whose map is shared did not run with this cache before")
        self.left -= 1
        if not self.left:
            self.keys = None
        return keys

    def at_source(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A pre-hook of the attention whose map is shared."""
        cache = _checked(module, args, kwargs)
        if cache is None:
            return None
        return args, {**kwargs, _name(kwargs): _Listening(cache, self)}

    def at_sharer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """A pre-hook of the attentions that share it."""
        cache = _checked(module, args, kwargs)
        if cache is None:
            return None
        return args, {**kwargs, _name(kwargs): _ValuesOnly(cache, self)}


def _name(kwargs: dict[str, Any]) -> str:
    return next((name for name in NAMES if kwargs.get(name) is not None), NAMES[0])


def _checked(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if any(isinstance(one, Cache) for one in args):
        raise UnsupportedModelError(
            f"{type(module).__name__} is handed its cache by place and not by name, so that "
            "its keys cannot be shared: call the model with use_cache=False"
        )
    cache = kwargs.get(_name(kwargs))
    if isinstance(cache, EncoderDecoderCache):  # self-attentions alone share maps
        cache = cache.self_attention_cache
    # one that listens already: layers began to share this source at different times
    if cache is None or isinstance(cache, DynamicCache | StaticCache | _Wrapped):
        return cache
    raise UnsupportedModelError(
        f"{type(cache).__name__}: a layer that shares another's map caches values only, and "
        "needs the other's keys as they were, which is done with DynamicCache and StaticCache; "
        "another cache may drop or change keys of one of the two"
    )


class _Wrapped:
    """A cache for the time of one attention's call."""

    def __init__(self, cache: Any, heard: Heard) -> None:
        self.cache, self.heard = cache, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class _Listening(_Wrapped):
    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> Any:
        found = self.cache.update(keys, values, layer, *more, **named)
        self.heard.hear(found[0])
        return found


class _ValuesOnly(_Wrapped):
    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> Any:
        cache, found = self.cache, self.heard.tell()
        if cache.layer_class_to_replicate is not None:
            while len(cache.layers) <= layer:
                cache.layers.append(cache.layer_class_to_replicate())
        held = cache.layers[layer]
        if type(held) is DynamicLayer and not held.is_initialized:
            cache.layers[layer] = ValuesLayer()
        _, values = cache.update(keys[..., :0], values, layer, *more, **named)
        return found, values
