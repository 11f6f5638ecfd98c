"""What one layer's attention saw, as a reduction of tokens reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.maps import AttentionMap

SMALL = 2**20
"""Numbers of a map that are held at once without a second thought: 4 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Sight:
    """One attention over n = special + patches tokens, and what is known of these tokens.

    `queries` `(batch, heads, n, head_dim)`, `keys` `(batch, kv_heads, n, head_dim)`, `values`
    `(batch, kv_heads, n, value_dim)`: what the layer's own projections gave. `scale`: of scores.
    `special`: tokens in front that always stay; `has_class`: whether the first of them is a class
    token. `sizes` `(batch, patches)`: how many original patches are in each token. `state`
    `(batch, patches)`: what the reduction noted about each in earlier layers, None before the
    first. `weighted`: whether keys count by their sizes (proportional attention). `layer` of
    `depth`, 0-based.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    special: int
    has_class: bool
    sizes: Tensor
    state: Tensor | None
    weighted: bool
    layer: int
    depth: int

    @property
    def patches(self) -> int:
        return self.keys.shape[2] - self.special

    def log_sizes(self) -> Tensor | None:
        """What proportional attention adds to the scores `(batch, 1, 1, n)`; None for nothing."""
        if not self.weighted:
            return None
        return with_special(self.sizes, self.special).log()[:, None, None].to(self.keys.dtype)

    def class_attention(self) -> Tensor:
        """The class token's row of each head's map, patches only `(batch, heads, patches)`.

        One query against all keys, O(n); gradients pass. Raises ValueError without class token.
        """
        if not self.has_class:
            raise ValueError(
                "this encoder has no class token whose attention could rank patches: take "
                "how='received', 'similar' or another way that needs none"
            )
        group = self.queries.shape[1] // self.keys.shape[1]
        keys = self.keys.repeat_interleave(group, 1) if group > 1 else self.keys
        scores = (self.queries[:, :, :1] * self.scale) @ keys.transpose(-1, -2)
        added = self.log_sizes()
        if added is not None:
            scores = scores + added
        return scores.softmax(-1)[:, :, 0, self.special :]

    def map(self) -> AttentionMap:
        """The whole map, lazily and without its matrix; no gradients."""
        added = self.log_sizes()
        bias = None if added is None else added.detach()
        return AttentionMap(self.queries, self.keys, scale=self.scale, bias=bias)

    def received(self) -> Tensor:
        """Mean attention that each patch receives from all tokens `(batch, heads, patches)`."""
        heads, n = self.queries.shape[1:3]
        some = SMALL // (heads * n * n)
        if not some:
            whole = self.map().received() / n
        else:  # maps of a few images at a time stay in the caches: measured, twice as quick
            whole = torch.cat([self._rows_mean(at, at + some) for at in self._starts(some)])
        return whole[..., self.special :].to(self.queries.dtype)

    def _starts(self, some: int) -> range:
        return range(0, len(self.queries), some)

    @torch.no_grad()
    def _rows_mean(self, start: int, stop: int) -> Tensor:
        """Mean rows `(images, heads, n)` of the maps of some images."""
        group = self.queries.shape[1] // self.keys.shape[1]
        keys = self.keys[start:stop].repeat_interleave(group, 1)
        scores = (self.queries[start:stop] * self.scale) @ keys.transpose(-1, -2)
        added = self.log_sizes()
        if added is not None:
            scores = scores + added[start:stop]
        return scores.float().softmax(-1).mean(2)


def with_special(sizes: Tensor, special: int) -> Tensor:
    """Sizes of all tokens `(batch, n)`: those in front stand for themselves."""
    return torch.cat([sizes.new_ones(len(sizes), special), sizes], 1)
