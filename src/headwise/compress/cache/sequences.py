"""Other sequences in the place of those of a batch: beams, copies, a part of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.compress.cache.block import Block


def taken(blocks: list[Block], sequences: Sequence[int], kv_heads: int) -> list[Block]:
    """Blocks of a batch whose sequence i is what sequence `sequences[i]` was."""
    total = sum(len(block.rows) for block in blocks)
    device = blocks[0].rows.device
    wanted = torch.tensor(sequences, device=device)[:, None] * kv_heads
    source = (wanted + torch.arange(kv_heads, device=device)).flatten()
    made: list[Block] = []
    for block in blocks:
        place = torch.full((total,), -1, device=device)
        place[block.rows] = torch.arange(len(block.rows), device=device)
        at = place[source]
        here = at >= 0
        if bool(here.any()):
            made.append(block.renumbered(at[here], here.nonzero()[:, 0], bool(here.all())))
    return made
