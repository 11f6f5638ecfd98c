"""A cache that holds the keys of one head of each cluster, and the values of all."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from headwise.compress.cache.buffer import Buffer
from headwise.compress.cache.head_clusters import (
    TOKENS,
    HeadClusters,
    cluster,
    correlation_of,
    flat_maps,
)
from headwise.compress.cache.layer_bits import cached_attentions
from headwise.compress.cache.reading import Call, read
from headwise.models import view
from headwise.models.cached import CachedKeys
from headwise.models.errors import UnsupportedModelError
from headwise.models.switching import hold

SCORES = 2**24
"""Scores that are held at one time (64 MiB of float32)."""

ROOM = 64


class ClusteredLayer(CacheLayerMixin):
    """Keys `(batch, clusters, n, d)` and values `(batch, kv_heads, n, d_v)` of one layer.

    `clusters`: for each head the one that serves it, or how many clusters to make of the first
    tokens of each sequence. The map is computed once for a cluster, from the queries and keys of
    the head that stands for it; every head takes its own values with it.
    """

    is_compileable = is_sliding = False
    is_croppable = True

    def __init__(self, clusters: Sequence[int] | int, tokens: int) -> None:
        super().__init__()
        self.clusters, self.tokens = clusters, tokens
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.length = 0
        self.leaders: Tensor | None = None  # (batch, clusters): heads that stand for one
        self.cluster_of: Tensor | None = None  # (batch, kv_heads): numbers of clusters
        self._held: tuple[Buffer, Buffer, Buffer] | None = None  # keys, values, which are real
        self._pending: Tensor | None = None

    # -- what transformers calls -------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made before there is something to hold."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys `(batch, kv_heads, m, d)`; what is returned is for `attend`."""
        self._pending = key_states.detach()
        return CachedKeys.of(key_states, self), value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is of the new tokens alone: who may look at older ones is known here."""
        return query_length, self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove places."""
        if self._held is not None and tokens_to_remove:
            self.length = max(0, self.length + tokens_to_remove)
            for buffer in self._held:
                buffer.crop(self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._held is not None:
            batch = self._held[2].held.shape[0]
            self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._held is None or self.leaders is None or self.cluster_of is None:
            return
        at = indices.to(self.leaders.device)
        self.leaders, self.cluster_of = self.leaders[at], self.cluster_of[at]
        heads = (self.leaders.shape[1], self.cluster_of.shape[1], 1)
        each = [(at[:, None] * n + torch.arange(n, device=at.device)).flatten() for n in heads]
        keys, values, real = (b.rows(rows) for b, rows in zip(self._held, each, strict=True))
        self._held = (keys, values, real)

    # -- attention ---------------------------------------------------------------------------

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        value: Tensor,
        mask: Tensor | None,
        given: dict[str, Any],
        before: str,
    ) -> Tensor:
        """`(batch, m, heads, d_v)`: see `headwise.models.cached.Serving`."""
        keys, self._pending = self._pending, None
        assert keys is not None, "attended without an update"
        call = read(module, query, keys, mask, given, before, None)
        if call.terms.sinks is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has learned sinks, which are every head's own: its heads "
                "cannot share a map"
            )
        batch, kv_heads, m, _ = keys.shape
        grouped = query.detach().unflatten(1, (kv_heads, -1))
        real = torch.ones(batch, m, dtype=torch.bool, device=keys.device)
        real = real if call.real is None else call.real
        if self.leaders is None:
            self._assign(grouped, keys, real, call)
        assert self.leaders is not None
        each = torch.arange(batch, device=keys.device)[:, None]
        new = (keys[each, self.leaders], value.detach(), real[:, None])
        flat = tuple(x.flatten(0, 1) for x in new)
        if self._held is None:
            first, second, third = (Buffer.copied(x, ROOM) for x in flat)
            self._held = (first, second, third)
        else:
            for buffer, x in zip(self._held, flat, strict=True):
                buffer.append(x)
        self.length += m
        self.is_initialized = True
        out = self._attended(grouped[each, self.leaders], call)
        return out.transpose(1, 2).contiguous().to(value.dtype)

    def _assign(self, queries: Tensor, keys: Tensor, real: Tensor, call: Call) -> None:
        """Clusters for each sequence: those given, or of the maps of its first tokens."""
        batch, kv_heads = keys.shape[:2]
        found = []
        for b in range(batch):
            of: Sequence[int]
            if isinstance(self.clusters, int):
                of = self._by_first_tokens(queries[b], keys[b], real[b], call)
            else:
                of = self.clusters
            if len(of) != kv_heads:
                raise ValueError(f"clusters of {len(of)} heads for a layer of {kv_heads}")
            found.append(list(of))
        table = torch.tensor(found, device=keys.device)
        self.leaders = torch.stack([row.unique() for row in table])
        self.cluster_of = (self.leaders[:, None] == table[:, :, None]).int().argmax(-1)

    def _by_first_tokens(
        self, queries: Tensor, keys: Tensor, real: Tensor, call: Call
    ) -> tuple[int, ...]:
        at = real.nonzero()[: self.tokens, 0]
        if len(at) < self.tokens:
            raise ValueError(
                f"a prompt of {len(at)} tokens does not tell which heads look alike: give at least "
                f"{self.tokens}, or clusters found beforehand (find_clusters)"
            )
        scores = queries[:, :, at].float() @ keys[:, None, at].float().mT * call.scale
        if call.terms.softcap is not None:
            scores = call.terms.softcap * torch.tanh(scores / call.terms.softcap)
        future = torch.ones(len(at), len(at), dtype=torch.bool, device=keys.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1).flatten(0, 1)
        assert isinstance(self.clusters, int)
        return cluster(correlation_of(flat_maps(weights, len(keys))), self.clusters)

    def _attended(self, queries: Tensor, call: Call) -> Tensor:
        """`(batch, heads, m, d_v)` for queries `(batch, clusters, g, m, d)`."""
        assert self._held is not None
        assert self.cluster_of is not None
        batch, _, group, m, _ = queries.shape
        keys, values, real = (b.content.unflatten(0, (batch, -1)) for b in self._held)
        n = self.length
        each = torch.arange(batch, device=queries.device)[:, None]
        at_once = max(1, SCORES // max(1, batch * values.shape[1] * group * n))
        whole = m == 1 and bool(real.all())
        parts = []
        for start in range(0, m, at_once):
            part = queries[:, :, :, start : start + at_once]
            rows = part.shape[3]
            scores = torch.matmul(part.flatten(2, 3) * call.scale, keys.mT)
            if call.terms.softcap is not None:
                scores = call.terms.softcap * torch.tanh(scores / call.terms.softcap)
            if not whole:
                place = torch.arange(n - m + start, n - m + start + rows, device=keys.device)
                seen = torch.arange(n, device=keys.device) <= place[:, None]
                hidden = ~(seen & real[:, 0, None])[:, None].repeat(1, 1, group, 1)
                scores = scores.masked_fill(hidden, -torch.inf)
            weights = scores.softmax(-1).nan_to_num_(0.0)  # padding sees nothing
            mine = weights[each, self.cluster_of]  # (batch, kv_heads, g * rows, n)
            parts.append(torch.matmul(mine, values).unflatten(2, (group, rows)))
        return torch.cat(parts, 3).flatten(1, 2)

    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        tables = [t.nbytes for t in (self.leaders, self.cluster_of) if t is not None]
        return sum(b.nbytes() for b in self._held or ()) + sum(tables)


class ClusteredCache(Cache):
    """A cache for `model.generate(..., past_key_values=ClusteredCache(model, clusters))`.

    `clusters`: what `find_clusters` gave; or how many clusters each layer has (one number for
    each), and then each sequence finds its own from its first `tokens` tokens, as CHAI does
    (Agarwal et al. 2024, arXiv 2403.08058). The model's attention is ours until `close()`, the
    end of a `with` block, or the cache's end.

    Raises ValueError for another number of layers or heads, UnsupportedModelError for a model
    whose layers have sliding windows or learned sinks.
    """

    def __init__(
        self, model: nn.Module, clusters: HeadClusters | Sequence[int], tokens: int = TOKENS
    ) -> None:
        attentions = cached_attentions(view(model))
        tables: tuple[Any, ...] = (
            clusters.of if isinstance(clusters, HeadClusters) else tuple(clusters)
        )
        if len(tables) != len(attentions):
            raise ValueError(
                f"clusters of {len(tables)} layers were given, and there are {len(attentions)}"
            )
        config: Any = model.config
        kinds = sorted(set(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]))
        if kinds != ["full_attention"]:
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers of {', '.join(kinds)}; heads are clustered in "
                "full_attention only"
            )
        for layer, (table, attention) in enumerate(zip(tables, attentions, strict=True)):
            most = attention.kv_heads
            fits = 1 <= table <= most if isinstance(table, int) else len(table) == most
            if not fits:
                raise ValueError(f"layer {layer} has {most} key-value heads; clusters: {table}")
        super().__init__(layers=[ClusteredLayer(table, tokens) for table in tables])
        self._model = weakref.ref(model)
        self._release = weakref.finalize(self, hold(model, attentions, cache=True))

    def nbytes(self) -> int:
        """Bytes of every tensor held, room to spare included."""
        layers: list[Any] = self.layers
        return sum(layer.nbytes() for layer in layers)

    def close(self) -> None:
        """Give the model its attention back."""
        self._release()

    def __enter__(self) -> ClusteredCache:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ClusteredCache:
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this ClusteredCache is gone")
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.layers = [copy.deepcopy(layer, memo) for layer in self.layers]
        release = hold(model, cached_attentions(view(model)), cache=True)
        made._release = weakref.finalize(made, release)
        return made
