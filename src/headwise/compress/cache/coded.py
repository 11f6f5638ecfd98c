"""Keys or values of past tokens in codes: R rows of n tokens, a token one line of bytes.

A line is cut out and put elsewhere without being touched: what is kept after an eviction has the
codes, lows and scales that it had. `ByToken` has its ranges in the token itself. `ByChannel`
shares ranges between neighbouring tokens, one for every channel (KIVI, Liu et al. 2024,
arXiv 2402.02750, section 3: keys have channels that are large in every token), so that a line
remembers by a small number whose ranges it was made with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.compress.cache.buffer import Buffer
from headwise.compress.cache.packing import decode, encode, pack, packed_size, ranges, unpack


@dataclass(frozen=True)
class Code:
    """bits of a number, numbers that share a range, and the type of ranges."""

    bits: int
    group: int
    scales: torch.dtype


class ByToken:
    """Every token has ranges of its own, one for each `code.group` channels."""

    def __init__(
        self, code: Code, channels: int, dtype: torch.dtype, buffers: tuple[Buffer, Buffer, Buffer]
    ) -> None:
        self.code, self.channels, self.dtype = code, channels, dtype
        self.codes, self.low, self.scale = buffers

    @classmethod
    def empty(cls, code: Code, like: Tensor, room: int = 0) -> ByToken:
        """For rows and channels as in `like` `(R, n, channels)`, without tokens."""
        rows, _, channels = like.shape
        group = min(code.group, channels)
        groups = -(-channels // group)
        bytes_each = packed_size(groups * group, code.bits)
        return cls(
            Code(code.bits, group, code.scales),
            channels,
            like.dtype,
            (
                _empty(like, rows, bytes_each, torch.uint8, room),
                _empty(like, rows, groups, code.scales, room),
                _empty(like, rows, groups, code.scales, room),
            ),
        )

    def __len__(self) -> int:
        return self.codes.length

    def append(self, x: Tensor, counted: Tensor | None = None, group: int | None = None) -> None:
        """Tokens `(R, m, channels)`; the rest is for `ByChannel`."""
        short = -x.shape[-1] % self.code.group
        if short:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
        lines = x.unflatten(-1, (-1, self.code.group))
        low, scale = ranges(lines.amin(-1), lines.amax(-1), self.code.bits, self.code.scales)
        codes = encode(lines, low[..., None], scale[..., None], self.code.bits)
        self.codes.append(pack(codes.flatten(-2), self.code.bits))
        self.low.append(low)
        self.scale.append(scale)

    def piece(self, start: int, stop: int) -> Tensor:
        """Tokens start to stop, `(R, stop - start, channels)`."""
        low, scale = self.low.content[:, start:stop], self.scale.content[:, start:stop]
        n = low.shape[-1] * self.code.group
        codes = unpack(self.codes.content[:, start:stop], self.code.bits, n)
        lines = codes.unflatten(-1, (-1, self.code.group))
        out = decode(lines, low[..., None], scale[..., None], self.dtype).flatten(-2)
        return out[..., : self.channels]

    def select(self, indices: Tensor, room: int = 0) -> ByToken:
        """Of each row the tokens `(R, k)`, to the bit."""
        return self._with(*(held.select(indices, room) for held in self._held))

    def rows(self, indices: Tensor) -> ByToken:
        return self._with(*(held.rows(indices) for held in self._held))

    def crop(self, length: int) -> None:
        for held in self._held:
            held.crop(length)

    @classmethod
    def joined(cls, parts: list[ByToken], room: int = 0) -> ByToken:
        """The rows of several of one length."""
        held = zip(*(part._held for part in parts), strict=True)
        return parts[0]._with(*(Buffer.joined(list(each), room) for each in held))

    def nbytes(self) -> int:
        return sum(held.nbytes() for held in self._held)

    @property
    def _held(self) -> tuple[Buffer, Buffer, Buffer]:
        return self.codes, self.low, self.scale

    def _with(self, codes: Buffer, low: Buffer, scale: Buffer) -> ByToken:
        return ByToken(self.code, self.channels, self.dtype, (codes, low, scale))


class ByChannel:
    """Every channel has one range for each `code.group` tokens that came together.

    `of`: `(R, n)`, the number of the ranges that a token was made with, None as long as they are
    in order. Ranges that no token has left are dropped.
    """

    def __init__(
        self,
        code: Code,
        channels: int,
        dtype: torch.dtype,
        buffers: tuple[Buffer, Buffer, Buffer],
        of: Buffer | None = None,
    ) -> None:
        self.code, self.channels, self.dtype, self.of = code, channels, dtype, of
        self.codes, self.low, self.scale = buffers

    @classmethod
    def empty(cls, code: Code, like: Tensor, room: int = 0) -> ByChannel:
        """For rows and channels as in `like` `(R, n, channels)`, without tokens."""
        rows, _, channels = like.shape
        groups = room // code.group
        buffers = (
            _empty(like, rows, packed_size(channels, code.bits), torch.uint8, room),
            _empty(like, rows, channels, code.scales, groups),
            _empty(like, rows, channels, code.scales, groups),
        )
        return cls(code, channels, like.dtype, buffers)

    def __len__(self) -> int:
        return self.codes.length

    def append(self, x: Tensor, counted: Tensor | None = None, group: int | None = None) -> None:
        """Tokens `(R, m, channels)` in whole groups of `group` (the usual one where None).

        `counted`: `(R, m)`, False for tokens that the ranges need not cover: those that stand out
        and are held elsewhere, or that go at once.
        """
        size = self.code.group if group is None else group
        if x.shape[1] % size:
            raise ValueError(f"{x.shape[1]} tokens are no whole groups of {size}")
        if self.of is not None or size != self.code.group:
            self._number(x.shape[1], size)
        lines = x.unflatten(1, (-1, size))
        least = largest = lines
        if counted is not None:
            out = ~counted.unflatten(1, (-1, size))[..., None]
            out &= ~out.all(2, keepdim=True)  # a group in which nobody counts has ranges too
            least = lines.masked_fill(out, torch.inf)
            largest = lines.masked_fill(out, -torch.inf)
        low, scale = ranges(least.amin(2), largest.amax(2), self.code.bits, self.code.scales)
        codes = encode(lines, low[:, :, None], scale[:, :, None], self.code.bits)
        self.codes.append(pack(codes.flatten(1, 2), self.code.bits))
        self.low.append(low)
        self.scale.append(scale)

    def _number(self, more: int, size: int) -> None:
        """Make `of`, for the tokens that are there and `more` that come."""
        held = self.codes.held
        before = self.low.length
        last = before + -(-more // size)
        if self.of is None:
            old = torch.arange(len(self), device=held.device) // self.code.group
            self.of = Buffer.copied(old.to(_small(last)).expand(held.shape[0], -1))
        elif last > torch.iinfo(self.of.held.dtype).max:
            self.of = Buffer.copied(self.of.content.to(_small(last)))
        new = torch.arange(before, last, device=held.device).repeat_interleave(size)[:more]
        self.of.append(new.to(self.of.held.dtype).expand(held.shape[0], -1))

    def piece(self, start: int, stop: int) -> Tensor:
        """Tokens start to stop, `(R, stop - start, channels)`."""
        codes = unpack(self.codes.content[:, start:stop], self.code.bits, self.channels)
        lows, scales = self.low.content, self.scale.content
        if self.of is not None:
            of = self.of.content[:, start:stop].long()
            each = torch.arange(len(of), device=of.device)[:, None]
            return decode(codes, lows[each, of], scales[each, of], self.dtype)
        size = self.code.group
        first, last = start // size, -(-stop // size)
        low, scale = lows[:, first:last], scales[:, first:last]
        if start % size == 0 and stop % size == 0:
            lines = codes.unflatten(1, (-1, size))
            return decode(lines, low[:, :, None], scale[:, :, None], self.dtype).flatten(1, 2)
        here = slice(start % size, start % size + stop - start)
        low, scale = (t.repeat_interleave(size, 1)[:, here] for t in (low, scale))
        return decode(codes, low, scale, self.dtype)

    def select(self, indices: Tensor, room: int = 0) -> ByChannel:
        """Of each row the tokens `(R, k)`, to the bit, and the ranges that they need."""
        of = indices // self.code.group
        if self.of is not None:
            of = self.of.content.gather(1, indices).long()
        used = torch.zeros(self.low.content.shape[:2], dtype=torch.bool, device=of.device)
        used.scatter_(1, of, True)
        most = int(used.sum(1).max()) if used.numel() else 0
        order = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        groups = room // self.code.group
        numbers = (used.cumsum(1) - 1).gather(1, of).to(_small(most + groups))
        return ByChannel(
            self.code,
            self.channels,
            self.dtype,
            (
                self.codes.select(indices, room),
                self.low.select(order, groups),
                self.scale.select(order, groups),
            ),
            Buffer.copied(numbers, room),
        )

    def rows(self, indices: Tensor) -> ByChannel:
        return ByChannel(
            self.code,
            self.channels,
            self.dtype,
            (self.codes.rows(indices), self.low.rows(indices), self.scale.rows(indices)),
            None if self.of is None else self.of.rows(indices),
        )

    def crop(self, length: int) -> None:
        if self.of is None and length % self.code.group and length < len(self):
            self._number(0, self.code.group)
        groups = -(-min(length, len(self)) // self.code.group)
        self.codes.crop(length)
        if self.of is None:
            self.low.crop(groups)
            self.scale.crop(groups)
        else:
            self.of.crop(length)

    @classmethod
    def joined(cls, parts: list[ByChannel], room: int = 0) -> ByChannel:
        """The rows of several of one length, with or without the same number of ranges."""
        most = max(part.low.length for part in parts)
        for part in parts:
            if part.of is None:
                part._number(0, part.code.group)
        tables = []
        for name in ("low", "scale"):
            held = [getattr(part, name).content for part in parts]
            padded = [torch.nn.functional.pad(t, (0, 0, 0, most - t.shape[1])) for t in held]
            tables.append(Buffer.copied(torch.cat(padded), room // parts[0].code.group))
        of = [part.of.content.to(_small(most)) for part in parts if part.of is not None]
        codes = Buffer.joined([part.codes for part in parts], room)
        return ByChannel(
            parts[0].code,
            parts[0].channels,
            parts[0].dtype,
            (codes, tables[0], tables[1]),
            Buffer.copied(torch.cat(of), room),
        )

    def nbytes(self) -> int:
        held = [self.codes, self.low, self.scale, *([] if self.of is None else [self.of])]
        return sum(one.nbytes() for one in held)


def _empty(like: Tensor, rows: int, width: int, dtype: torch.dtype, room: int) -> Buffer:
    return Buffer(like.new_empty((rows, room, width), dtype=dtype), 0)


def _small(largest: int) -> torch.dtype:
    return torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32
