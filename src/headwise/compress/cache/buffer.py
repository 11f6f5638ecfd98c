"""A tensor that grows at its second dimension without being copied at each step."""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 16
"""A full buffer grows by a sixteenth of itself at least: copying then costs a token no more than
16 entries, and room to spare is at most 6 % of what is held."""

ROOM = 32
"""By how many entries a full buffer grows at least."""

FEW = 16
"""Up to so many rows are selected from one by one, straight into their place."""


PIECE = 2**16
"""Numbers that are moved at a time within a row: a piece stays in a core's cache."""


class Buffer:
    """R rows of `length` entries, `(R, length, ...)`, in a tensor `(R, room, ...)`. `lent`: the
    tensor is somebody else's, not to be written into."""

    def __init__(self, held: Tensor, length: int, lent: bool = False) -> None:
        self.held, self.length, self.lent = held, length, lent

    @classmethod
    def copied(cls, content: Tensor, room: int = 0) -> Buffer:
        """Of a copy of `(R, n, ...)`, with room for `room` more."""
        made = cls._empty(content, content.shape[0], content.shape[1] + room)
        made[:, : content.shape[1]] = content
        return cls(made, content.shape[1])

    @classmethod
    def joined(cls, buffers: list[Buffer], room: int = 0) -> Buffer:
        """The rows of several buffers of one length."""
        first = buffers[0]
        rows = sum(buffer.held.shape[0] for buffer in buffers)
        made = cls._empty(first.held, rows, first.length + room)
        torch.cat([buffer.content for buffer in buffers], out=made[:, : first.length])
        return cls(made, first.length)

    @property
    def content(self) -> Tensor:
        """`(R, length, ...)`, a view."""
        return self.held[:, : self.length]

    def append(self, more: Tensor) -> None:
        """Entries `(R, m, ...)` at the end."""
        end = self.length + more.shape[1]
        if end > self.held.shape[1] or self.lent:
            room = max(ROOM, self.length // GROWTH) if more.shape[1] <= ROOM else 0
            grown = self._empty(self.held, self.held.shape[0], end + room)
            grown[:, : self.length] = self.content
            self.held, self.lent = grown, False
        self.held[:, self.length : end] = more
        self.length = end

    def select(self, indices: Tensor, room: int = 0, rows: Tensor | None = None) -> Buffer:
        """Entries `(R, k)` of each row, or of the rows at the places `rows`, in a new buffer."""
        count, k = indices.shape
        made = self._empty(self.held, count, k + room)
        if rows is None and count > FEW and self.held.is_contiguous():
            first = torch.arange(count, device=indices.device)[:, None] * self.held.shape[1]
            flat = self.held.view(-1, *self.held.shape[2:])
            chosen = flat.index_select(0, (indices + first).view(-1))
            made[:, :k] = chosen.view(count, k, *self.held.shape[2:])
            return Buffer(made, k)
        for row, at in enumerate(range(count) if rows is None else rows.tolist()):
            torch.index_select(self.held[at], 0, indices[row], out=made[row, :k])
        return Buffer(made, k)

    def keep(self, indices: Tensor, room: int = 0) -> Buffer:
        """As `select`, for when this buffer is not needed any more: entries move within it where
        it is about as large as what is wanted."""
        k, held = indices.shape[1], self.held
        wanted = k + room
        if self.lent or not wanted <= held.shape[1] <= wanted + wanted // GROWTH + room:
            return self.select(indices, room)
        piece = max(1, PIECE // max(1, held[0, :1].numel()))
        here = torch.arange(k, device=indices.device)
        for row, at in enumerate(indices):
            stays = int((at == here).sum())  # the first ones lie where they are to be
            for start in range(stays, k, piece):  # none is written to before it was read
                moved = held[row].index_select(0, at[start : start + piece])
                held[row, start : start + len(moved)] = moved
        return Buffer(held, k)

    def rows(self, indices: Tensor) -> Buffer:
        """Some of the rows, in a new buffer."""
        return Buffer(self.held.index_select(0, indices), self.length)

    def crop(self, length: int) -> None:
        """Only the first entries; the room stays."""
        self.length = min(self.length, length)

    def nbytes(self) -> int:
        """Bytes of the storage, also of what lies beyond `content` in it."""
        return self.held.untyped_storage().nbytes()

    @staticmethod
    def _empty(like: Tensor, rows: int, entries: int) -> Tensor:
        return like.new_empty((rows, entries, *like.shape[2:]))
