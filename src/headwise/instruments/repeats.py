"""Scores on a random sequence that stands twice, where only the repetition tells what comes next.

Olsson et al. 2022 (arXiv 2209.11895): an induction head looks at the token after the earlier
place of its own token; a previous-token head feeds it.
"""

import torch

from headwise.instruments.band import NEAR
from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.instruments.reading import Reading

__all__ = ["Repeats"]


class Repeats(Instrument):
    """Means over the rows of the second time. Row i stands for the token that stood at
    i - period: the mass at i - period + 1 is induction, at i - period duplicate, at i - 1
    previous token. Not measured in cross-attention."""

    name = "repeats"
    stimulus = "repeat"
    columns = columns(
        "induction_score", "previous_token_score", "duplicate_token_score", "positional_random"
    )

    def read(self, reading: Reading) -> Numbers:
        found = reading.batch.repeat.get(reading.attention.stack)
        if found is None or reading.cross:
            return {}
        s = reading.map.scores
        second = torch.arange(found.period, device=s.device) + found.start + found.period
        second = second[second < s.n_k]  # a decoder's shifted copy may lack the last token
        rows = reading.map.rows(second - s.offset)  # short sequences: a few hundred keys

        def at(offset: torch.Tensor | int) -> torch.Tensor:
            """Weights `(batch, heads, rows)` on the key so far back, 0 where there is none."""
            key = second - offset
            there = (key >= 0) & (key < s.n_k)
            place = key.clamp(0, s.n_k - 1)[:, None].expand(*rows.shape[:3], 1)
            return rows.gather(-1, place)[..., 0] * there

        near = torch.stack([at(offset) for offset in range(1 - NEAR, NEAR)], -1)
        profile = near.mean(2, keepdim=True)
        return {
            "induction_score": at(found.period - 1).mean(-1),
            "previous_token_score": at(1).mean(-1),
            "duplicate_token_score": at(found.period).mean(-1),
            "positional_random": torch.minimum(near, profile).sum(-1).mean(-1),
        }
