"""Layers that read the keys and values of an earlier layer and hold none of their own.

Which layers can do so is found by trying it: what neighbours in the stack compute is alike in some
places and not in others, and nothing cheaper than the model's own answer says where (KVSharer,
Yang et al. 2024, arXiv 2410.18517, even finds that caches that look unlike may be shared). The
price of a table is therefore the divergence of the model's predictions on calibration text, with
the layers really reading each other's caches. `share_attention` shares maps instead, and takes the
projections out as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from headwise.compress.cache.layer_bits import cached_attentions
from headwise.instruments.examples import Examples, model_view, read_examples
from headwise.instruments.run import evaluating
from headwise.models import ModelView

TRIES = 3
"""How many of the cheapest layers are measured again, with those taken already, in each round."""


class SharedLayers(Cache):
    """A cache in which layer l reads what layer `reads[l]` holds.

        cache = SharedLayers(DynamicCache(config=model.config), reads=(0, 1, 1, 3))
        model.generate(**inputs, past_key_values=cache)

    Layers with `reads[l] == l` have caches of their own, in `cache`, any cache of transformers;
    the others hold nothing, not for a moment. Raises ValueError for a layer that reads a later
    one or one without a cache; when it runs, for layers whose keys and values differ in shape;
    TypeError for a cache that attends by itself (HeadCache) and returns no keys to be shared.
    """

    def __init__(self, cache: Cache, reads: Sequence[int]) -> None:
        self.reads = check_reads(reads)
        if any(hasattr(layer, "attend") for layer in cache.layers):
            raise TypeError(
                f"{type(cache).__name__} attends by itself and hands no keys to other layers: give "
                "a cache such as DynamicCache(config=model.config)"
            )
        self.cache = cache
        super().__init__(layers=cache.layers)
        self._readers = Counter(r for layer, r in enumerate(self.reads) if r != layer)
        self._given: dict[int, tuple[Any, int]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """transformers' interface: what the layer's attention is to look at."""
        source = self.reads[layer_idx]
        if source == layer_idx:
            given = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
            if self._readers[source]:
                self._given[source] = (given, self._readers[source])
            return given
        given, left = self._given.pop(source)
        if left > 1:
            self._given[source] = (given, left - 1)
        for mine, theirs in zip((key_states, value_states), given, strict=True):
            if mine.shape[:2] != theirs.shape[:2] or mine.shape[-1] != theirs.shape[-1]:
                raise ValueError(
                    f"layer {layer_idx} cannot read layer {source}: keys or values of "
                    f"{tuple(mine.shape)} and {tuple(theirs.shape)}"
                )
        return given

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(self.reads[layer_idx])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, self.reads[layer_idx])

    def reset(self) -> None:
        self._given.clear()
        self.cache.reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        self.cache.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self.cache.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.batch_select_indices(indices)

    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        if hasattr(self.cache, "nbytes"):
            return int(self.cache.nbytes())
        held = {}
        for layer in self.cache.layers:
            for x in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(x, Tensor):
                    storage = x.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())


def check_reads(reads: Sequence[int]) -> tuple[int, ...]:
    """The table, or ValueError for a layer that cannot read what it is to read."""
    found = tuple(int(r) for r in reads)
    for layer, source in enumerate(found):
        if not 0 <= source <= layer:
            raise ValueError(f"layer {layer} is to read layer {source}: expected 0 to {layer}")
        if found[source] != source:
            raise ValueError(
                f"layer {layer} is to read layer {source}, which has no cache of its own (it reads "
                f"layer {found[source]})"
            )
    return found


@dataclass(frozen=True)
class Sharing:
    """`reads`: the layer that each layer reads. `divergence`: of the model's predictions, mean
    KL(before, after) in nats a token, after each layer that was given up, in the order in which
    they were: `order`."""

    reads: tuple[int, ...]
    order: tuple[int, ...]
    divergence: tuple[float, ...]

    @property
    def kept(self) -> float:
        """Share of the layers that have a cache of their own."""
        own = sum(source == layer for layer, source in enumerate(self.reads))
        return own / len(self.reads)


@torch.no_grad()
def find_sharing(
    model: nn.Module | ModelView, inputs: Any, keep: float = 0.75, reach: int = 1, **reading: Any
) -> Sharing:
    """Give up the caches of layers, one by one, until a share `keep` of them is left.

    Every layer is tried with each of the `reach` layers before it that have a cache; then, round
    by round, the `TRIES` cheapest changes are measured again on top of those made, and the best is
    made. inputs, `reading`: as for `read_examples`. The model's logits on the calibration text are
    held: tokens x vocabulary. Raises ValueError for a `keep` that cannot be.
    """
    look = model_view(model)
    layers = cached_attentions(look)
    most = len(layers) - 1
    count = len(layers) - round(keep * len(layers))
    if not 0 < keep <= 1 or count > most:
        raise ValueError(
            f"keep={keep}: of {len(layers)} layers 1 at least keeps its cache, so that "
            f"{1 / len(layers):.3g} to 1 can be kept"
        )
    kinds = [_kind(look, n) for n in range(len(layers))]
    reads = tuple(range(len(layers)))
    order: list[int] = []
    found: list[float] = []
    with evaluating(look.model):
        batches = read_examples(look.model, inputs, **reading)
        before = [logits.log_softmax(-1) for logits in _logits(look.model, batches, reads)]

        def price(table: tuple[int, ...]) -> float:
            total = tokens = 0.0
            for was, logits in zip(before, _logits(look.model, batches, table), strict=True):
                now = logits.log_softmax(-1)
                total += float(F.kl_div(now, was, log_target=True, reduction="sum"))
                tokens += was[..., 0].numel()
            return total / tokens

        alone = {
            (layer, source): price(_with(reads, layer, source))
            for layer in range(len(layers))
            for source in range(max(0, layer - reach), layer)
            if count and kinds[layer] == kinds[source]
        }
        while len(order) < count:
            own = [reads[layer] == layer and layer not in reads[layer + 1 :] for layer in range(
                len(layers))]  # fmt: skip
            free = [c for c in alone if own[c[0]] and reads[c[1]] == c[1]]
            if not free:
                raise ValueError(
                    f"keep={keep}: only {len(order)} layers can read one of the {reach} before "
                    "them; give a larger reach="
                )
            free.sort(key=alone.__getitem__)
            tried = {c: price(_with(reads, *c)) for c in free[:TRIES]}
            best = min(tried, key=tried.__getitem__)
            reads = _with(reads, *best)
            order.append(best[0])
            found.append(tried[best])
    return Sharing(reads, tuple(order), tuple(found))


def _with(reads: tuple[int, ...], layer: int, source: int) -> tuple[int, ...]:
    return (*reads[:layer], source, *reads[layer + 1 :])


def _logits(model: Any, batches: list[Examples], reads: tuple[int, ...]) -> Iterator[Tensor]:
    for batch in batches:
        cache = SharedLayers(DynamicCache(config=model.config), reads)
        yield model(**batch.given, past_key_values=cache, use_cache=True).logits.float()


def _kind(look: ModelView, layer: int) -> tuple[Any, ...]:
    """What two layers must have in common for one to read the other's cache."""
    attention = cached_attentions(look)[layer]
    config: Any = getattr(look.model, "config", None)
    types = getattr(config, "layer_types", None)
    return (attention.kv_heads, attention.head_dim, types[layer] if types else None)
