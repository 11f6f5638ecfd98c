"""The place in a HeadCache of a layer that has no attention any more."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headwise.compress.cache.layer import HeadLayer


class SilentLayer(HeadLayer):
    """Counts the tokens that came by, because the length of a cache is asked of single layers, and
    holds nothing. (What stands in the attention's place hands over zeros for each.)"""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.held.length += key_states.shape[2]
        self.is_initialized = True
        return key_states, value_states

    def crop(self, tokens_to_remove: int) -> None:
        self.held.length = max(0, self.held.length + tokens_to_remove)

    def copied(self) -> HeadLayer:
        made = SilentLayer(self.index, self.sliding_window, self.rules)
        made.held, made.record_past = self.held.copied(), self.record_past
        made.is_initialized = self.is_initialized
        return made
