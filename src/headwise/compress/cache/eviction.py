"""Which entries a layer lets go of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.compress.cache.block import Block
from headwise.compress.cache.policy import Seen
from headwise.compress.cache.rules import Rules


@dataclass(frozen=True)
class Extent:
    """What a layer has been given: `length` places, padding included, of which each sequence has
    `real` tokens; `kv_heads` rows a sequence; its sliding `window`, where it has one."""

    layer: int
    length: int
    real: Sequence[int]
    kv_heads: int
    window: int | None


def evicted(
    blocks: list[Block], extent: Extent, rules: Rules, see: Callable[[Block], Seen]
) -> list[Block] | None:
    """New blocks of what is kept, or None where no row is over its budget.

    Padding goes first, and what a sliding window has left behind. The sinks (the first entries of
    a row, as long as none of them has slid out of the layer's window) and the newest `window`
    entries stay whatever they score.
    """
    asked = [_Asked(block, extent, rules, see) for block in blocks]
    caps = _caps(asked, extent, rules)
    over = [one for one in asked if one.block.length > min(caps[row] for row in one.rows)]
    if not over:
        return None
    kept = [one.block for one in asked if one not in over]
    groups: dict[int, list[tuple[_Asked, list[int]]]] = {}
    counts: dict[int, int] = {}
    for one in over:
        places: dict[int, list[int]] = {}
        for at, (row, alive) in enumerate(zip(one.rows, one.alive_counts, strict=True)):
            counts[row] = min(alive, caps[row])
            places.setdefault(rules.rounded(counts[row]), []).append(at)
        for key, found in places.items():
            groups.setdefault(key, []).append((one, found))
    total = len(extent.real) * extent.kv_heads
    for members in groups.values():
        k = max(counts[one.rows[at]] for one, found in members for at in found)
        room = rules.patience(k)
        parts = [one.select(found, k, counts, room) for one, found in members]
        kept += Block.joined(parts, total, room)
    return kept


def _caps(asked: list[_Asked], extent: Extent, rules: Rules) -> list[int]:
    """How many entries each row of the layer may keep."""
    heads = extent.kv_heads
    scores: dict[int, Tensor] = {}
    if rules.budget.needs_scores:
        for one in asked:
            for row, worth, alive in zip(one.rows, one.scores, one.alive, strict=True):
                scores[row] = worth[alive]
    caps: list[int] = []
    for sequence, real in enumerate(extent.real):
        length = real if extent.window is None else min(real, extent.window)
        rows = range(sequence * heads, (sequence + 1) * heads)
        wanted = rules.budget.keep(extent.layer, length, [scores[r] for r in rows if r in scores])
        if len(wanted) not in (1, heads):
            raise ValueError(
                f"{rules.budget!r} gave {len(wanted)} numbers for layer {extent.layer}, which has "
                f"{heads} key-value heads"
            )
        each = wanted * heads if len(wanted) == 1 else wanted
        sinks = rules.sinks if extent.window is None or real <= extent.window else 0
        most = extent.length if extent.window is None else extent.window
        caps += [rules.rounded(min(max(count, sinks + rules.window), most)) for count in each]
    return caps


class _Asked:
    """A block with what is alive in it, and what the policy says of it once that is asked."""

    def __init__(
        self, block: Block, extent: Extent, rules: Rules, see: Callable[[Block], Seen]
    ) -> None:
        self.block, self.extent, self.rules, self._see = block, extent, rules, see
        self.rows: list[int] = block.rows.tolist()
        self.alive = block.positions >= 0
        if extent.window is not None:  # the next query's place is `length`
            self.alive &= block.positions > extent.length - extent.window
        self.alive_counts: list[int] = self.alive.sum(1).tolist()
        self._scores: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """`(R, n)` float32: the policy's, infinite for sinks and window, -inf for the dead."""
        if self._scores is None:
            found = self.rules.policy.score(self._see(self.block))
            self._check(found)
            self._scores = self._guarded(found.float())
        return self._scores

    def _check(self, found: Tensor) -> None:
        name = type(self.rules.policy).__name__
        if found.shape != self.alive.shape:
            raise ValueError(
                f"{name}.score() returned {tuple(found.shape)}; expected (rows, entries) = "
                f"{tuple(self.alive.shape)}"
            )
        if bool(found.isnan().any()):
            raise ValueError(f"{name}.score() returned NaN for some entries")

    def _guarded(self, scores: Tensor) -> Tensor:
        rank = self.alive.cumsum(1, dtype=torch.int32)
        kept = rank > rank[:, -1:] - self.rules.window
        if self.extent.window is None:
            kept |= rank <= self.rules.sinks
        else:
            whole = [real <= self.extent.window for real in self.extent.real]
            sequence = self.block.rows // self.extent.kv_heads
            intact = torch.tensor(whole, device=kept.device)[sequence]
            kept |= (rank <= self.rules.sinks) & intact[:, None]
        return scores.masked_fill(kept, math.inf).masked_fill(~self.alive, -math.inf)

    def select(self, at: list[int], k: int, counts: dict[int, int], room: int) -> Block:
        """A block of k entries of the rows at the places `at`: the best ones, padding where there
        are not so many."""
        device = self.alive.device
        places = torch.tensor(at, device=device)
        alive, n = self.alive[places], self.block.length
        chosen = min(k, n)
        if any(counts[self.rows[p]] < self.alive_counts[p] for p in at):
            scores = self.scores[places]
        else:
            scores = torch.zeros(alive.shape, device=device).masked_fill_(~alive, -math.inf)
        keep = _best(scores, chosen)
        indices = keep.nonzero()[:, 1].view(len(at), chosen)  # ascending
        real = alive.gather(1, indices)
        if k > n:  # rows of another block are longer
            indices = torch.nn.functional.pad(indices, (k - n, 0))
            real = torch.nn.functional.pad(real, (k - n, 0))
        return self.block.select(places, indices, None if bool(real.all()) else real, room)


def _best(scores: Tensor, k: int) -> Tensor:
    """`(R, n)`, True for the k highest of each row; of equal ones the newest, so that what is
    kept does not depend on what else lies in the row."""
    if not k:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.kthvalue(scores.shape[1] - k + 1, 1, keepdim=True).values
    above, equal = scores > least, scores == least
    newest = equal.flip(1).cumsum(1, dtype=torch.int32).flip(1)
    return above | (equal & (newest <= k - above.sum(1, keepdim=True)))
