"""Tokens among those in codes that are held in full precision as well, because they stand out."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.compress.cache.buffer import Buffer


class Outliers:
    """`at`: `(R, o)` int32, places among the tokens in codes, -1 where a row has fewer;
    `keys` `(R, o, d)` and `values` `(R, o, d_v)` as they came."""

    def __init__(self, at: Buffer, keys: Buffer, values: Buffer) -> None:
        self.at, self.keys, self.values = at, keys, values

    @classmethod
    def none(cls, keys: Tensor, values: Tensor) -> Outliers:
        """Of the rows of `keys` and `values`, without any."""
        at = keys.new_empty((len(keys), 0), dtype=torch.int32)
        return cls(Buffer(at, 0), Buffer(keys[:, :0].clone(), 0), Buffer(values[:, :0].clone(), 0))

    def append(self, at: Tensor, keys: Tensor, values: Tensor) -> None:
        self.at.append(at.int())
        self.keys.append(keys)
        self.values.append(values)

    def put(self, start: int, stop: int, keys: Tensor, values: Tensor) -> None:
        """Into the pieces `(R, stop - start, ...)` that were unpacked."""
        at = self.at.content
        rows, which = ((at >= start) & (at < stop)).nonzero(as_tuple=True)
        into = at[rows, which].long() - start
        keys[rows, into] = self.keys.content[rows, which]
        values[rows, into] = self.values.content[rows, which]

    def select(self, indices: Tensor, length: int) -> Outliers:
        """Those that are among the kept tokens `indices` `(R, k)` of `length`, at their new
        places. A token that comes several times (to fill a row up) is the last of them."""
        place = torch.full((len(indices), length + 1), -1, device=indices.device)
        new = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
        place.scatter_reduce_(1, indices, new, "amax")
        at = self.at.content.long()
        at = place.gather(1, torch.where(at < 0, length, at))
        kept = at >= 0
        most = int(kept.sum(1).max()) if kept.numel() else 0
        order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        at = at.gather(1, order).int()
        return Outliers(Buffer(at, most), self.keys.select(order), self.values.select(order))

    def rows(self, indices: Tensor) -> Outliers:
        return Outliers(self.at.rows(indices), self.keys.rows(indices), self.values.rows(indices))

    def crop(self, length: int) -> None:
        at = self.at.content
        at[at >= length] = -1

    @classmethod
    def joined(cls, parts: list[Outliers]) -> Outliers:
        most = max(part.at.length for part in parts)

        def padded(x: Tensor, value: float) -> Tensor:
            short = most - x.shape[1]
            return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, short), value=value)

        at = torch.cat([padded(part.at.content, -1) for part in parts])
        keys = torch.cat([padded(part.keys.content, 0) for part in parts])
        values = torch.cat([padded(part.values.content, 0) for part in parts])
        return cls(*(Buffer(t, most) for t in (at, keys, values)))

    def nbytes(self) -> int:
        return self.at.nbytes() + self.keys.nbytes() + self.values.nbytes()


def distances(keys: Tensor, group: int) -> Tensor:
    """`(R, m)`: squared distance of each key from the mean of its group."""
    lines = keys.float().unflatten(1, (-1, group))
    return (lines - lines.mean(2, keepdim=True)).square().sum(-1).flatten(1)


def largest_of_groups(x: Tensor, group: int, count: int) -> Tensor:
    """`(R, groups * count)`: places of the `count` largest of each group."""
    top = x.unflatten(1, (-1, group)).topk(count, -1).indices
    first = torch.arange(top.shape[1], device=x.device)[:, None] * group
    return (top + first).flatten(1)
