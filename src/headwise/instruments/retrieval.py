"""Retrieval: does a head find the place in the context from which the next token is copied?

Wu et al. 2024 (arXiv 2404.15574). Their needle is a sentence that the model is asked for, and
heads are scored while it answers; weak models do not answer. Here the needle is a span of the
user's own text, hidden at some depth of other text and repeated at the end, teacher-forced: the
first of its tokens is given as a cue, and each of the others is to be produced next.
"""

import torch

from headwise.instruments.columns import columns
from headwise.instruments.instrument import Instrument, Numbers
from headwise.instruments.reading import Reading

__all__ = ["Retrieval"]


class Retrieval(Instrument):
    """A head copies a token if, where it is to be produced next, the head's largest weight lies
    on a place in the needle that holds it; the score is the share of the needle's distinct tokens
    so copied (equation 1). Measured in causal models."""

    name = "retrieval"
    stimulus = "needle"
    columns = columns("retrieval_score")

    def read(self, reading: Reading) -> Numbers:
        needle, ids = reading.batch.needle, reading.key_ids
        if needle is None or ids is None or reading.cross or reading.ahead:
            return {}
        steps = needle.length - 1
        row = torch.arange(steps, device=ids.device) + needle.again
        offset = reading.map.scores.offset
        key = reading.map.rows(row - offset).argmax(-1)  # (batch, heads, steps)
        wanted = ids[:, row + 1]  # (batch, steps)
        start = needle.start.to(ids.device)[:, None, None]
        inside = (key >= start) & (key < start + needle.length)
        held = ids[:, None].expand(-1, key.shape[1], -1).gather(-1, key)
        copied = inside & (held == wanted[:, None])
        same = (wanted[:, :, None] == wanted[:, None, :]).float()  # steps of one token
        ever = torch.einsum("bhs,bst->bht", copied.float(), same) > 0
        weight = 1 / same.sum(-1)  # so that each distinct token counts once
        share = (ever * weight[:, None]).sum(-1) / weight.sum(-1)[:, None]
        return {"retrieval_score": share}
