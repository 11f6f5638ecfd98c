"""A trained module says, when an entry arrives, whether it will be needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from headwise.compress.cache.policy import Policy, Seen


class Learned(Policy):
    """score_j = what a module said of (query_j, key_j, value_j) when token j arrived.

    `modules`: one for each layer, a list or by the layer's number. A module gets the new tokens
    alone, `module(queries (R, g, m, d), keys (R, m, d), values (R, m, d_v), heads (R,))`, and
    returns `(R, m)`; `heads` are the key-value heads of the rows. So scores are causal: no later
    token changes them. Keys and queries come as the cache sees them, after rotary embeddings.

    Source: Huang et al., "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained
    Retaining Heads", arXiv 2410.01805, section 3.2; its modules and their training are
    `headwise.compress.cache.policies.retaining.RetainingHeads`.
    """

    needs_queries = None

    def __init__(self, modules: Sequence[nn.Module] | Mapping[int, nn.Module]) -> None:
        given = modules.items() if isinstance(modules, Mapping) else enumerate(modules)
        self.modules: dict[int, nn.Module] = dict(given)

    @torch.no_grad()
    def observe(self, seen: Seen) -> Tensor:
        """`(R, n)` float32: the scores carried along, and those of the new tokens."""
        module = self.modules.get(seen.layer)
        if module is None:
            raise ValueError(
                f"Learned has modules for the layers {sorted(self.modules)}, not for {seen.layer}: "
                "give one for every layer that has a cache"
            )
        new = seen.queries.shape[2]
        old = seen.positions.shape[1] - new
        told: Tensor = module(seen.queries, seen.keys[:, old:], seen.values[:, old:], seen.heads)
        if told.shape != (len(seen.rows), new):
            raise ValueError(
                f"the module of layer {seen.layer} returned {tuple(told.shape)}, expected one "
                f"score for each row and new token, {(len(seen.rows), new)}"
            )
        before = told.new_zeros(len(told), old) if seen.state is None else seen.state[:, :old]
        return torch.cat([before.float(), told.float()], 1)

    def score(self, seen: Seen) -> Tensor:
        """`(R, n)` float32."""
        if seen.state is None:
            raise ValueError("Learned scores what `observe` has collected: call it before")
        return seen.state
