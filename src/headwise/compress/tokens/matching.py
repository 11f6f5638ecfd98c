"""Patches that resemble each other become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.compress.tokens.reduction import Reduction, joined
from headwise.compress.tokens.sight import Sight


@dataclass(frozen=True)
class Similarity(Reduction):
    """Bipartite soft matching (ToMe, Bolya et al. 2022, arXiv 2210.09461, section 3): patches are
    dealt in turn to two sides, each of the first side finds the most similar one of the second,
    and the most similar pairs become one token, the mean of its patches.

    Similar is the cosine of the layer's keys, mean over heads. `proportional`: keys count by the
    patches in them from then on. More than half of the tokens go in several rounds.
    """

    proportional: bool = True

    def __call__(self, tokens: Tensor, sight: Sight, k: int) -> tuple[Tensor, Tensor]:
        metric = sight.keys.mean(1)[:, sight.special :].detach()
        sizes = sight.sizes
        groups = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        shift = sight.special
        while tokens.shape[1] > k:
            gone = min(tokens.shape[1] - k, tokens.shape[1] // 2)
            found = matched(cosines(metric), gone, shift)
            m = tokens.shape[1] - gone
            metric = averaged(metric, sizes, found, m)
            tokens = averaged(tokens, sizes, found, m)
            sizes = joined(sizes, found, m)
            groups = found.gather(1, groups)
            shift = 0
        return tokens, groups


def cosines(metric: Tensor) -> Tensor:
    """`(batch, n, width)` to `(batch, n, n)`."""
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return unit @ unit.transpose(-1, -2)


def matched(scores: Tensor, gone: int, shift: int = 0) -> Tensor:
    """Groups `(batch, n)` of a bipartite matching by pair scores `(batch, n, n)` that leaves
    n - gone tokens, the new ones in the order of their first members.

    Patch i is on the first side where i + shift is even (shift: tokens in front). Raises
    ValueError for more than that side has.
    """
    batch, n, _ = scores.shape
    order = torch.arange(n, device=scores.device)
    first, second = order[(order + shift) % 2 == 0], order[(order + shift) % 2 == 1]
    if len(first) < gone:  # an odd number of patches: the longer side gives
        first, second = second, first
    if not 0 <= gone <= len(first) or not len(second):
        raise ValueError(f"{gone} of {n} tokens cannot go in one round of matching")
    best, partner = scores[:, first][:, :, second].max(-1)
    sources = best.topk(gone, 1).indices  # which of the first side are joined to their partner
    leader = order.expand(batch, n).clone()
    leader.scatter_(1, first[sources], second[partner.gather(1, sources)])
    return numbered(leader)


def numbered(leader: Tensor) -> Tensor:
    """Groups numbered by where their first members are, from each token's leader `(batch, n)`."""
    batch, n = leader.shape
    order = torch.arange(n, device=leader.device).expand(batch, n)
    start = torch.full_like(leader, n).scatter_reduce(1, leader, order, "amin")
    begins = torch.zeros(batch, n + 1, dtype=torch.long, device=leader.device)
    begins.scatter_(1, start, 1)
    return (begins.cumsum(1) - 1).gather(1, start.gather(1, leader))


def averaged(tokens: Tensor, weights: Tensor, groups: Tensor, m: int) -> Tensor:
    """The means of groups `(batch, m, width)` of tokens `(batch, n, width)`, by weights
    `(batch, n)`. A token alone in its group stays as it is, to the bit."""
    weights = weights.to(tokens.dtype)
    members = joined(torch.ones_like(weights), groups, m)
    share = weights / joined(weights, groups, m).gather(1, groups.clamp_min(0))
    alone = members.gather(1, groups.clamp_min(0)) == 1
    share = torch.where(alone, torch.ones_like(share), share)
    return joined(tokens * share[..., None], groups, m)
