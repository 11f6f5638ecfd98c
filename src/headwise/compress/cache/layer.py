"""One layer of a HeadCache, as transformers and our attention call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from headwise.compress.cache.block_attention import Query
from headwise.compress.cache.ragged import Ragged
from headwise.compress.cache.reading import Call, places, read
from headwise.compress.cache.rules import Rules
from headwise.compress.cache.unequal import UnequalGroups
from headwise.maps import attend
from headwise.models.cached import CachedKeys
from headwise.models.interface import original, unchanged
from headwise.models.projections import READ


class HeadLayer(CacheLayerMixin):
    """`update` takes new keys and values and returns keys that only `attend` can read; `attend`
    runs in the place of the model's attention, appends what is new, attends, and lets go of what
    is over the budget before the next layer runs. `held` is what there is."""

    is_compileable = False

    def __init__(self, index: int, window: int | None, rules: Rules) -> None:
        super().__init__()
        self.index, self.sliding_window, self.rules = index, window, rules
        self.is_sliding = window is not None
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.held = Ragged(self.index, self.sliding_window, self.rules)
        self._pending: Tensor | None = None
        self.is_initialized = False

    # -- what transformers calls -------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made before there is something to hold."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys `(batch, kv_heads, m, d)` and values; what is returned is for `attend`."""
        held = self.held
        if self._pending is not None:
            raise RuntimeError(
                f"layer {self.index} was given keys a second time before anybody attended to the "
                "first: a pass was interrupted (call reset(), or use a new HeadCache), or two "
                "attentions share this layer of the cache"
            )
        if held.blocks and key_states.shape[:2] != (len(held.real), held.kv_heads):
            raise ValueError(
                f"layer {self.index} holds {len(held.real)} sequences of {held.kv_heads} key-value "
                f"heads, and was given keys of shape {tuple(key_states.shape)}"
            )
        if held.due:
            held.evict()  # a recorded step that nobody took back
        self._pending = key_states.detach()
        return CachedKeys.of(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Places seen, padding and what was let go of included: the next token's position."""
        return self.held.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is of the new tokens alone: who may look at the entries is known here."""
        return query_length, self.held.length

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether a step taken back leaves no trace, once past recording was activated: a policy
        that notes what queries do has noted it."""
        return not self.rules.observes

    def activate_past_recording(self) -> None:
        """Let go of nothing until the next `crop` or `update`, so that the last step can be
        taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove places. Raises ValueError for a number that is
        positive or too large, RuntimeError where entries were let go of after the place to go
        back to: what was there is not known."""
        count, held = -tokens_to_remove, self.held
        if count < 0 or count > held.length:
            raise ValueError(
                f"crop({tokens_to_remove}): say how many of the {held.length} tokens to remove as "
                "a number of 0 or less"
            )
        if count and held.length - count < held.settled:
            raise RuntimeError(
                f"crop({tokens_to_remove}): layer {self.index} let go of entries when "
                f"{held.settled} of its {held.length} tokens were seen, so that it cannot go back "
                "to before. Copy the cache (copy.deepcopy) before a step that is to be taken back, "
                "or call activate_past_recording() before the step"
            )
        if count and count == held.length:
            self.reset()
        elif count:
            held.forget(count)
        if self.held.due:
            self.held.evict()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.held.take(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.held.take([i for i in range(len(self.held.real)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        every = torch.arange(len(self.held.real), device=indices.device)
        self.held.take(every[indices].tolist())

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
        call = read(module, query, keys, mask, given, before, self.sliding_window)
        keys, values, held = keys.to(query.dtype), value.detach(), self.held
        of = getattr(module, READ, None)
        groups = None if of is None else UnequalGroups(of)
        asked = self._query(query.detach(), keys, call, groups)
        first = not held.blocks
        if first:
            mine = (keys, value) if groups is None else (groups.repeat(keys), groups.repeat(value))
            out = self._first(module, query, *mine, mask, given, before, call)
            held.begin(keys, values, asked, call.real)
        else:
            held.append(keys, values, asked, call.real)
            rows = held.attend(asked, value.shape[-1])
            heads = rows.view(len(query), -1, *rows.shape[2:])
            heads = heads if groups is None else groups.gather(heads)
            out = heads.transpose(1, 2).contiguous()
        held.observe(asked)
        held.let_go(first, wait=self.record_past)
        self.is_initialized = True
        return out.to(value.dtype)

    def _query(
        self, query: Tensor, keys: Tensor, call: Call, groups: UnequalGroups | None
    ) -> Query:
        query = query if groups is None else groups.spread(query)
        batch, heads, m, d = query.shape
        kv_heads = keys.shape[1]
        at = places(self.held.length, m, batch, call.real, keys.device)
        sinks = call.terms.sinks
        if sinks is not None and groups is not None:
            sinks = groups.spread(sinks, 0)
        if sinks is not None:
            sinks = sinks.detach().view(1, kv_heads, -1).expand(batch, -1, -1).flatten(0, 1)
        return Query(
            query.reshape(batch * kv_heads, heads // kv_heads, m, d),
            at.repeat_interleave(kv_heads, 0),
            call.scale,
            call.terms.softcap,
            sinks,
            self.sliding_window,
        )

    def _first(
        self,
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        value: Tensor,
        mask: Tensor | None,
        given: dict[str, Any],
        before: str,
        call: Call,
    ) -> Tensor:
        """The first chunk: by the model's own kernel where that makes no mask."""
        theirs = original(module, before) if before != "eager" else None
        short = self.sliding_window is None or query.shape[2] < self.sliding_window
        if theirs is not None and call.causal and short:
            return unchanged(theirs, module, query, keys, value, mask, given)[0]
        t = call.terms
        out, _ = attend(query, keys, value, t.pattern, call.scale, None, t.sinks, t.softcap)
        return out.transpose(1, 2).contiguous()

    # -- copies ------------------------------------------------------------------------------

    def copied(self) -> HeadLayer:
        """A layer of its own, by the same rules."""
        if self._pending is not None:
            raise RuntimeError("a HeadCache cannot be copied in the middle of a pass")
        made = HeadLayer(self.index, self.sliding_window, self.rules)
        made.held, made.record_past = self.held.copied(), self.record_past
        made.is_initialized = self.is_initialized
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadLayer:
        return self.copied()
