"""Products with keys and values that stay in codes.

A number in codes is low + scale * code. In a product with queries the scale can be multiplied into
the query, and in a sum of values into the weight, of which there are few: what is left to do for
every number is to take it out of its byte.

    keys by channel, ranges of a group of tokens G:  q . k_j = q . low_G + (q * scale_G) . code_j
    values by token, ranges of a group of channels C:
        (sum_j w_j v_j)_C = sum_j (w_j scale_jC) code_jC + sum_j w_j low_jC
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headwise.compress.cache.coded import ByChannel, ByToken
from headwise.compress.cache.outliers import Outliers
from headwise.compress.cache.packing import unpack
from headwise.compress.cache.store import Piece


@dataclass(frozen=True)
class InCodes(Piece):
    """Tokens `start` to `stop` of keys and values in codes, those of `outliers` as they came."""

    keys: ByChannel | ByToken
    values: ByToken
    outliers: Outliers
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def scores(self, queries: Tensor) -> Tensor:
        """`(R, c, t)`."""
        if isinstance(self.keys, ByChannel):
            scores = _asked_by_channel(self.keys, queries, self.start, self.stop)
        else:
            scores = _asked_by_token(self.keys, queries, self.start, self.stop)
        if not self.outliers.at.length:
            return scores
        at = self._places(queries.shape[1])
        known = torch.bmm(queries, self.outliers.keys.content.to(queries.dtype).transpose(1, 2))
        return pad(scores, (0, 1)).scatter_(2, at, known)[..., :-1]

    def summed(self, weights: Tensor) -> Tensor:
        """`(R, c, d_v)`."""
        if not self.outliers.at.length:
            return self._summed(weights)
        at = self._places(weights.shape[1])
        padded = pad(weights, (0, 1))
        known = torch.bmm(padded.gather(2, at), self.outliers.values.content.to(weights.dtype))
        return self._summed(padded.scatter_(2, at, 0)[..., :-1]) + known

    def _places(self, count: int) -> Tensor:
        """`(R, c, o)`: where outliers lie among the t tokens; t for those that do not."""
        at = self.outliers.at.content.long()
        here = (at >= self.start) & (at < self.stop)
        at = torch.where(here, at - self.start, len(self))
        return at[:, None].expand(-1, count, -1)

    def _summed(self, weights: Tensor) -> Tensor:
        held, kind = self.values, weights.dtype
        here = slice(self.start, self.stop)
        low, scale = (t.content[:, here].to(kind) for t in (held.low, held.scale))  # (R, t, groups)
        codes = unpack(held.codes.content[:, here], held.code.bits, _width(held)).to(kind)
        rows, count, _ = weights.shape
        groups = low.shape[-1]
        weighed = weights[:, None] * scale.transpose(1, 2)[:, :, None]  # (R, groups, c, t)
        # Each group's weights with all channels: what is too much costs less than cutting codes up.
        every = torch.bmm(weighed.flatten(1, 2), codes).view(rows, groups, count, groups, -1)
        own = every.diagonal(dim1=1, dim2=3).permute(0, 1, 3, 2)  # (R, c, groups, group)
        own = own + torch.bmm(weights, low)[..., None]
        return own.flatten(2)[..., : held.channels]


def _asked_by_channel(held: ByChannel, queries: Tensor, start: int, stop: int) -> Tensor:
    if held.of is not None:
        return _asked_by_number(held, held.of.content[:, start:stop], queries, start, stop)
    kind, size = queries.dtype, held.code.group
    first, last = start // size, -(-stop // size)
    low, scale = (t.content[:, first:last].to(kind) for t in (held.low, held.scale))  # (R, G, d)
    codes = unpack(held.codes.content[:, start:stop], held.code.bits, held.channels).to(kind)
    rows, count, width = queries.shape
    scaled = (queries[:, None] * scale[:, :, None]).view(-1, count, width)
    scores = torch.bmm(scaled, codes.view(-1, size, width).transpose(1, 2))
    scores = scores.view(rows, -1, count, size).transpose(1, 2)
    return (scores + torch.bmm(queries, low.transpose(1, 2))[..., None]).flatten(2)


def _asked_by_number(held: ByChannel, of: Tensor, queries: Tensor, start: int, stop: int) -> Tensor:
    """Where tokens of one range are no longer neighbours: every token by the query that was scaled
    for its range. With several queries it is quicker to unpack the keys."""
    kind = queries.dtype
    if queries.shape[1] > 1:
        keys = held.piece(start, stop).to(kind)
        return torch.bmm(keys, queries.transpose(1, 2)).transpose(1, 2)
    low, scale = (t.content.to(kind) for t in (held.low, held.scale))
    codes = unpack(held.codes.content[:, start:stop], held.code.bits, held.channels).to(kind)
    of = of.long()
    each = torch.arange(len(of), device=of.device)[:, None]
    scores = (queries * scale)[each, of].mul_(codes).sum(-1)
    return (scores + torch.bmm(low, queries.transpose(1, 2))[:, :, 0].gather(1, of))[:, None]


def _asked_by_token(held: ByToken, queries: Tensor, start: int, stop: int) -> Tensor:
    kind, size = queries.dtype, held.code.group
    here = slice(start, stop)
    low, scale = (t.content[:, here].to(kind) for t in (held.low, held.scale))  # (R, t, groups)
    codes = unpack(held.codes.content[:, here], held.code.bits, _width(held)).to(kind)
    rows, count, width = queries.shape
    parts = pad(queries, (0, _width(held) - width)).unflatten(-1, (-1, size))
    groups = parts.shape[2]
    apart = torch.diag_embed(parts.transpose(2, 3), dim1=1, dim2=3)  # (R, groups, c, groups, size)
    scores = torch.bmm(apart.reshape(rows, groups * count, -1), codes.transpose(1, 2))
    scores = scores.view(rows, groups, count, -1) * scale.transpose(1, 2)[:, :, None]
    return scores.sum(1) + torch.bmm(parts.sum(-1), low.transpose(1, 2))


def _width(held: ByToken) -> int:
    """Channels of a line, with those that fill its last group up."""
    return held.low.content.shape[-1] * held.code.group
