"""The tile engine: any score, any pattern, O(n x tile) memory.

Logits are computed block by block, used while they are in cache and dropped. One pass finds the
row log-sum-exps (kept from then on), every statistic is one more pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from headwise.maps.scores import Piece, Scores

NEGATIVE_INFINITY = float("-inf")
LOG2_E = math.log2(math.e)


def power(x: Tensor) -> Tensor:
    """exp(x), in place: base 2 because PyTorch's exp on a CPU is several times slower where
    numbers underflow or are -inf, as most of a sharp map's are."""
    return x.mul_(LOG2_E).exp2_()


def tile_shape(scores: Scores) -> tuple[int, int, int]:
    """(query rows, key columns, key-value heads) of a tile.

    On a CPU the tile should stay in the second-level caches (about a million numbers over all
    cores: measured, larger is slower) and hold enough heads to keep the cores busy; on a GPU it
    should be large enough to fill the device.
    """
    if scores.device.type != "cpu":
        rows = max(64, min(1024, 1 << (scores.n_q - 1).bit_length())) if scores.n_q else 64
        return rows, 8192, max(1, min(scores.kv_heads, 16 // scores.group or 1))
    rows, columns = 64, 1024
    kv = max(1, min(scores.kv_heads, 2**20 // (rows * columns * scores.group)))
    return rows, columns, kv


def online_attend(
    scores: Scores, v: Tensor, shape: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """out `(batch, heads, n_q, d_v)` and lse `(batch, heads, n_q)`, in the compute type.

    The log-sum-exps of key ranges merge exactly (Milakov & Gimelshein 2018, arXiv 1805.02867;
    Rabe & Staats 2021, arXiv 2112.05682), so one pass over the tiles is enough. Differentiable.
    """
    outs: dict[tuple[int, int, int], Tensor] = {}
    lses: dict[tuple[int, int, int], Tensor] = {}
    group = scores.group
    for piece in scores.pieces(*(shape or tile_shape(scores))):
        (b0, b1), (g0, g1), (r0, r1) = piece.batch, piece.kv, piece.rows
        size = (b1 - b0, (g1 - g0) * group, r1 - r0)
        top = torch.full(size, NEGATIVE_INFINITY, dtype=scores.dtype, device=scores.device)
        total = torch.zeros(size, dtype=scores.dtype, device=scores.device)
        if scores.sinks is not None:
            top = scores.sinks[g0 * group : g1 * group].to(top.dtype)[None, :, None].expand(size)
            total = torch.ones_like(total)
        out = torch.zeros((*size, v.shape[-1]), dtype=scores.dtype, device=scores.device)
        for first, last, masked in piece.tiles:
            s = scores.tile(piece, first, last, masked)
            peak = torch.maximum(top, s.detach().amax(-1))
            safe = peak.masked_fill(peak == NEGATIVE_INFINITY, 0.0)
            p = torch.exp2((s - safe[..., None]) * LOG2_E)
            shrink = torch.exp(top - safe)
            total = total * shrink + p.sum(-1)
            values = v[b0:b1, g0:g1, first:last].to(p.dtype)
            mixed = p.view(b1 - b0, g1 - g0, -1, last - first) @ values
            out = out * shrink[..., None] + mixed.view(*size, -1)
            top = peak
        safe = top.masked_fill(top == NEGATIVE_INFINITY, 0.0)
        lses[(r0, b0, g0)] = safe + total.log()
        outs[(r0, b0, g0)] = out / total.masked_fill(total == 0, 1.0)[..., None]
    return _assemble(outs, scores, v.shape[-1]), _assemble(lses, scores)


def _assemble(parts: dict[tuple[int, int, int], Tensor], scores: Scores, *tail: int) -> Tensor:
    """Put pieces keyed by (first row, first batch, first kv head) back together."""
    if not parts:
        return torch.zeros(
            (scores.batch, scores.heads, scores.n_q, *tail),
            dtype=scores.dtype,
            device=scores.device,
        )
    rows = []
    for r0 in sorted({key[0] for key in parts}):
        batch = []
        for b0 in sorted({key[1] for key in parts}):
            kv = sorted(key[2] for key in parts if key[:2] == (r0, b0))
            batch.append(torch.cat([parts[(r0, b0, g0)] for g0 in kv], 1))
        rows.append(torch.cat(batch, 0))
    return torch.cat(rows, 2)


class TileEngine:
    """Statistics by tiles. `lse` `(batch, heads, n_q)` may be given where it is known."""

    name = "tiles"

    def __init__(
        self,
        scores: Scores,
        lse: Tensor | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.scores = scores
        self.shape = shape or tile_shape(scores)
        self._lse = lse

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            none = self.scores.k.new_zeros((*self.scores.k.shape[:3], 0))
            self._lse = online_attend(self.scores, none, self.shape)[1]
        return self._lse

    def _walk(self) -> Iterator[tuple[Piece, tuple[slice, slice, slice], Tensor]]:
        """Pieces with their place in `(batch, heads, n_q)` tensors and their safe lse."""
        group = self.scores.group
        for piece in self.scores.pieces(*self.shape):
            at = (
                slice(*piece.batch),
                slice(piece.kv[0] * group, piece.kv[1] * group),
                slice(*piece.rows),
            )
            lse = self.lse[at].to(self.scores.dtype)
            yield piece, at, lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0)

    def _log_tiles(self, piece: Piece, lse: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(keys, log p) of one piece's tiles."""
        for first, last, masked in piece.tiles:
            yield slice(first, last), self.scores.tile(piece, first, last, masked) - lse[..., None]

    def _rows(self, add: Callable[[Tensor, slice, Piece], Tensor]) -> Tensor:
        """Sum over tiles of `add(log p, keys, piece) -> (batch, heads, rows)`."""
        s = self.scores
        out = torch.zeros((s.batch, s.heads, s.n_q), dtype=s.dtype, device=s.device)
        for piece, at, lse in self._walk():
            for keys, x in self._log_tiles(piece, lse):
                out[at] += add(x, keys, piece)
        return out

    def apply(self, values: Tensor) -> Tensor:
        s = self.scores
        out = torch.zeros(
            (s.batch, s.heads, s.n_q, values.shape[-1]), dtype=s.dtype, device=s.device
        )
        for piece, at, lse in self._walk():
            b, kv = slice(*piece.batch), slice(*piece.kv)
            for keys, x in self._log_tiles(piece, lse):
                p = power(x)
                some = values[b, kv, keys].to(p.dtype)
                mixed = p.view(p.shape[0], some.shape[1], -1, p.shape[-1]) @ some
                out[at] += mixed.view(*p.shape[:3], -1)
        return out

    def transpose_apply(self, weights: Tensor) -> Tensor:
        s = self.scores
        out = torch.zeros((s.batch, s.heads, s.n_k), dtype=s.dtype, device=s.device)
        for piece, at, lse in self._walk():
            w = weights[at].to(s.dtype)[..., None, :]
            for keys, x in self._log_tiles(piece, lse):
                out[at[0], at[1], keys] += (w @ power(x))[..., 0, :]
        return out

    def entropy(self) -> Tensor:
        return self._rows(lambda x, keys, piece: torch.special.entr(power(x)).sum(-1))

    def collision(self) -> Tensor:
        return self._rows(lambda x, keys, piece: power(x).square_().sum(-1))

    def max(self) -> Tensor:
        s = self.scores
        out = torch.full(
            (s.batch, s.heads, s.n_q), NEGATIVE_INFINITY, dtype=s.dtype, device=s.device
        )
        for piece, at, lse in self._walk():
            for _, x in self._log_tiles(piece, lse):
                out[at] = torch.maximum(out[at], x.amax(-1))
        return out.exp_()

    def distance_moments(self) -> tuple[Tensor, Tensor]:
        s = self.scores
        mass = self._rows(lambda x, keys, piece: power(x).sum(-1))
        seen = mass.clamp_min(torch.finfo(s.dtype).tiny)
        position = s.positions().to(s.dtype)

        def distance(keys: slice, piece: Piece) -> Tensor:
            j = torch.arange(keys.start, keys.stop, device=s.device, dtype=s.dtype)
            return position[slice(*piece.rows)][:, None] - j[None, :]

        mean = self._rows(lambda x, keys, piece: (power(x) * distance(keys, piece)).sum(-1)) / seen

        def spread(x: Tensor, keys: slice, piece: Piece) -> Tensor:
            group = s.group
            at = (
                slice(*piece.batch),
                slice(piece.kv[0] * group, piece.kv[1] * group),
                slice(*piece.rows),
            )
            gap = distance(keys, piece) - mean[at][..., None]
            return (power(x) * gap.square_()).sum(-1)

        return mean, self._rows(spread) / seen

    def _joint(self, other: Scores, mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over keys of p_a * p_b and of p_a * (log p_a - log p_b)."""
        s = self.scores
        size = (s.batch, s.heads, s.n_q)
        inner = torch.zeros(size, dtype=s.dtype, device=s.device)
        kl = torch.zeros(size, dtype=s.dtype, device=s.device)
        for piece, at, lse in self._walk():
            safe = theirs[at].to(s.dtype)
            safe = safe.masked_fill(safe == NEGATIVE_INFINITY, 0.0)
            group = other.group
            for keys, x in self._log_tiles(piece, lse):
                # the other map may share its key heads differently: ask for whole groups of it
                g0, g1 = at[1].start // group, -(-at[1].stop // group)
                wider = Piece(piece.batch, (g0, g1), piece.rows, ())
                y = other.tile(wider, keys.start, keys.stop, True)
                y = y[:, at[1].start - g0 * group :][:, : x.shape[1]] - safe[..., None]
                p = x.exp()
                inner[at] += (p * y.exp()).sum(-1)
                kl[at] += torch.where(p > 0, p * (x - y), torch.zeros_like(p)).sum(-1)
        return inner, kl

    def inner(self, other: Scores) -> Tensor:
        return self._joint(other, self.lse, TileEngine(other).lse)[0]

    def kl(self, other: Scores) -> Tensor:
        return self._joint(other, self.lse, TileEngine(other).lse)[1]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        s = self.scores
        size = (s.batch, s.heads, s.n_q, k)
        values = torch.full(size, NEGATIVE_INFINITY, dtype=s.dtype, device=s.device)
        index = torch.full(size, -1, dtype=torch.long, device=s.device)
        for piece, at, lse in self._walk():
            for keys, x in self._log_tiles(piece, lse):
                found, where = x.topk(min(k, x.shape[-1]), dim=-1)
                pool = torch.cat([values[at], found], -1)
                names = torch.cat([index[at], where + keys.start], -1)
                values[at], best = pool.topk(k, dim=-1)
                index[at] = names.gather(-1, best)
        values = values.exp_()
        return values, index.masked_fill_(values == 0, -1)
