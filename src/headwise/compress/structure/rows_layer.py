"""A layer of a transformers cache that holds keys and values of some sequences of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headwise.models.errors import UnsupportedModelError


class RowsLayer(DynamicLayer):
    """`open` `(batch,)`: the sequences that are held. `seen`: tokens, of all sequences alike."""

    def __init__(self, opened: Tensor, **more: Any) -> None:
        super().__init__(**more)
        self.open, self.seen = opened, 0

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.seen = max(0, self.seen - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(beam_idx.to(self.open.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(torch.arange(len(self.open), device=self.open.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        index = torch.arange(len(self.open), device=self.open.device)
        self._choose(index.repeat_interleave(repeats))

    def _choose(self, index: Tensor) -> None:
        rows = rows_among(self.open, index)
        self.open = self.open[index]
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self.keys[rows], self.values[rows]


class SlidingRowsLayer(RowsLayer, DynamicSlidingWindowLayer):
    """The same with a sliding window."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self.cumulative_length = self.seen  # it may be that nobody was held, and nothing came in
        return super().get_mask_sizes(query_length)


def rows_among(opened: Tensor, index: Tensor) -> Tensor:
    """Where, among the sequences that are held, those of `index` stand."""
    place = opened.long().cumsum(0) - 1
    return place[index[opened[index]]]


def rows_layer(cache: Any, layer: int, decide: Any) -> RowsLayer:
    """The cache's layer as a RowsLayer; in a new one `decide()` says which sequences it holds.

    Raises UnsupportedModelError for another cache than DynamicCache, and for layers that are not
    new.
    """
    if not isinstance(cache, DynamicCache):
        raise UnsupportedModelError(
            f"{type(cache).__name__}: a routed attention caches the sequences that run it, "
            "which is done with DynamicCache only"
        )
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    held: Any = cache.layers[layer]
    if isinstance(held, RowsLayer):
        return held
    if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer) or held.is_initialized:
        raise UnsupportedModelError(
            f"layer {layer} of this cache is a {type(held).__name__}"
            + (" and not empty" if held.is_initialized else "")
            + ": a routed attention needs a new DynamicLayer or DynamicSlidingWindowLayer"
        )
    if isinstance(held, DynamicSlidingWindowLayer):
        made: RowsLayer = SlidingRowsLayer(decide(), sliding_window=held.sliding_window)
    else:
        made = RowsLayer(decide())
    cache.layers[layer] = made
    return made
