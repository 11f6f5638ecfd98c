"""The statistics that everybody wants, from one pass over the map.

Engines answer one question a pass. Measuring a model asks for the same six numbers of every
head, so here one pass over tiles yields them together. What makes it quick on a CPU (measured):
tiles stand keys-major, `(heads, keys, group * rows)`, because then every sum over keys is a left
product with a few rows, which costs next to nothing, while the sum over queries runs along memory;
-lse rides along as one more coordinate of the product; and base-2 exponentials are cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.maps.scores import Scores
from headwise.maps.tiles import LOG2_E, NEGATIVE_INFINITY

RUN = 256  # keys whose distance moments are summed in one go: short enough for float32


@dataclass(frozen=True)
class MapSummary:
    """Row statistics `(batch, heads, n_q)` and column sums `(batch, heads, n_k)`, float32.

    `logsumexp` and `entropy` in nats; `max` the largest weight of a row; `mean_distance` and
    `distance_variance` of i - j in tokens under a row; `received` the sum over queries. The
    variance is taken over runs of 256 keys in float32 and is good to 0.004 tokens squared;
    `AttentionMap.distance_variance()` is exact to float32 and costs passes of its own.
    """

    logsumexp: Tensor
    entropy: Tensor
    max: Tensor
    mean_distance: Tensor
    distance_variance: Tensor
    received: Tensor


def summary_shape(scores: Scores) -> tuple[int, int, int]:
    """(query rows, key columns, key-value heads): two buffers of it should stay in cache."""
    if scores.device.type != "cpu":
        return max(64, 2048 // scores.group), 4096, max(1, min(scores.kv_heads, 4))
    rows, columns = max(16, min(128, 512 // scores.group)), 512
    kv = max(1, min(scores.kv_heads, 2**19 // (rows * scores.group * columns)))
    return rows, columns, kv


@torch.no_grad()
def summarize(scores: Scores, lse: Tensor, shape: tuple[int, int, int] | None = None) -> MapSummary:
    """One pass over the map, given its row log-sum-exps `(batch, heads, n_q)`."""
    rows, columns, kv = shape or summary_shape(scores)
    columns = max(RUN, columns // RUN * RUN)
    s, dtype, device, group = scores, scores.dtype, scores.device, scores.group
    size = (s.batch, s.heads, s.n_q)
    lse = lse.to(dtype)
    entropy, peak, first, second = (torch.zeros(size, dtype=dtype, device=device) for _ in range(4))
    received = torch.zeros((s.batch, s.heads, s.n_k), dtype=dtype, device=device)
    folded = s.softcap is None and s.bias is None
    basis = _moment_basis(dtype, device)
    keys = s.k.to(dtype)
    if folded:
        keys = torch.nn.functional.pad(keys, (0, 1), value=1.0)  # meets -lse in the queries
    logits = torch.empty(kv * columns * group * rows, dtype=dtype, device=device)
    weights = torch.empty_like(logits)

    for piece in s.pieces(rows, columns, kv):
        (b, _), (g0, g1), (r0, r1) = piece.batch, piece.kv, piece.rows
        heads, r, g = slice(g0 * group, g1 * group), r1 - r0, g1 - g0
        row_lse = lse[b, heads, r0:r1]
        safe = row_lse.masked_fill(row_lse == NEGATIVE_INFINITY, 0.0).reshape(g, 1, group * r)
        q = (s.q[b, heads, r0:r1].to(dtype) * (s.scale * LOG2_E)).reshape(g, group * r, -1)
        if folded:
            q = torch.cat([q, safe.transpose(1, 2) * -LOG2_E], -1)
        columns_of_q = q.transpose(1, 2).contiguous()
        k = keys[b, g0:g1]
        i = torch.arange(r0, r1, device=device) + s.offset
        minus_plogp = torch.zeros((g, group * r), dtype=dtype, device=device)
        largest = torch.full((g, group * r), NEGATIVE_INFINITY, dtype=dtype, device=device)
        moments: list[tuple[Tensor, Tensor]] = []
        for low, high, masked in piece.tiles:
            c = high - low
            x = logits[: g * c * group * r].view(g, c, group * r)
            p = weights[: x.numel()].view_as(x)
            torch.bmm(k[:, low:high], columns_of_q, out=x)
            if folded and masked:
                _hide(x, s, b, heads, i, low, high)
            if not folded:
                x.copy_(_shaped(x, s, b, heads, i, low, high, masked))
                x.sub_(safe * LOG2_E)
            torch.exp2(x, out=p)
            largest = torch.maximum(largest, p.amax(1))
            received[b, heads, low:high] += (
                p.view(g, c, group, r).sum(-1).transpose(1, 2).reshape(g * group, c)
            )
            moments += _moments(p, basis, low)
            minus_plogp -= x.mul_(p).sum(1)
        at = (b, heads, slice(r0, r1))
        entropy[at] = (minus_plogp / LOG2_E).view(-1, r)
        peak[at] = largest.clamp_min(0.0).view(-1, r)
        mean, variance = _merge(moments, (g, group * r), device)
        mass = mean != mean  # rows without a key have no mean
        distance = i.double().repeat(group) - mean
        first[at] = distance.masked_fill(mass, 0.0).to(dtype).view(-1, r)
        second[at] = variance.masked_fill(mass, 0.0).to(dtype).view(-1, r)

    return MapSummary(
        logsumexp=lse.float(),
        entropy=entropy.clamp_min_(0.0).float(),
        max=peak.clamp_max_(1.0).float(),
        mean_distance=first.float(),
        distance_variance=second.float(),
        received=received.float(),
    )


def _hide(x: Tensor, s: Scores, b: int, heads: slice, i: Tensor, low: int, high: int) -> None:
    """Set forbidden logits of a keys-major tile to a finite value whose weight is zero.

    Finite, because the entropy multiplies logit by weight and 0 * inf is not a number.
    """
    mask = _mask(s, b, heads, i, low, high)
    view = x.view(x.shape[0], high - low, s.group, len(i))
    view.masked_fill_(~mask, -1e30)


def _mask(s: Scores, b: int, heads: slice, i: Tensor, low: int, high: int) -> Tensor:
    """The pattern of a tile, keys-major: broadcasts to `(kv, keys, group, rows)`."""
    j = torch.arange(low, high, device=s.device)
    batch = torch.arange(b, b + 1, device=s.device)
    head = torch.arange(s.heads, device=s.device)[heads]
    tile = s.pattern.tile(i, j, batch, head)[0]  # (heads or 1, rows, keys)
    if tile.shape[0] == 1:
        return tile.transpose(1, 2)[:, :, None, :]
    return tile.view(-1, s.group, len(i), high - low).permute(0, 3, 1, 2)


def _shaped(
    x: Tensor, s: Scores, b: int, heads: slice, i: Tensor, low: int, high: int, masked: bool
) -> Tensor:
    """Soft-cap, bias and mask on a keys-major tile whose logits are in base 2."""
    g, c, width = x.shape
    rows_major = x.view(g, c, s.group, -1).permute(0, 2, 3, 1).reshape(1, g * s.group, -1, c)
    j = torch.arange(low, high, device=s.device)
    out = s.shape_logits(rows_major / LOG2_E, i, j, slice(b, b + 1), heads, masked) * LOG2_E
    out = out.clamp_min(-1e30)
    return out.view(g, s.group, -1, c).permute(0, 3, 1, 2).reshape(g, c, width)


def _moment_basis(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3, RUN): one, centred position and its square, for a run of RUN keys."""
    u = torch.arange(RUN, dtype=dtype, device=device) - (RUN - 1) / 2
    return torch.stack([torch.ones_like(u), u, u * u])


def _moments(p: Tensor, basis: Tensor, low: int) -> list[tuple[Tensor, Tensor]]:
    """Sums of p, p u, p u^2 over runs of keys of a tile `(kv, keys, rows)`.

    Returns (sums `(kv, runs, 3, rows)`, centres `(runs,)`): positions are taken from the centre
    of a short run, since p j^2 over 32,768 keys does not fit float32.
    """
    g, c, rows = p.shape
    out = []
    whole = c // RUN * RUN
    if whole:
        sums = torch.matmul(basis, p[:, :whole].view(g, -1, RUN, rows))
        centre = low + torch.arange(0, whole, RUN, device=p.device) + (RUN - 1) / 2
        out.append((sums, centre))
    if c > whole:
        rest = c - whole
        u = basis[1, :rest] + (RUN - rest) / 2  # centred on this shorter run
        sums = torch.matmul(torch.stack([basis[0, :rest], u, u * u]), p[:, whole:])[:, None]
        centre = torch.full((1,), low + whole + (rest - 1) / 2, device=p.device)
        out.append((sums, centre))
    return out


def _merge(
    moments: list[tuple[Tensor, Tensor]], size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the key position `(kv, rows)`, NaN in rows without a key, float64.

    Runs are merged as in Chan et al. 1983: the variance is that within runs plus that of the
    runs' means, so that no large squares cancel.
    """
    if not moments:
        nan = torch.full(size, float("nan"), dtype=torch.float64, device=device)
        return nan, nan
    sums = torch.cat([m.transpose(1, 2) for m, _ in moments], 2).double()  # (kv, 3, runs, rows)
    centre = torch.cat([c for _, c in moments]).double()[None, :, None]
    mass, offset, square = sums.unbind(1)
    total = mass.sum(1)
    total = total.masked_fill(total == 0, float("nan"))
    share = mass.clamp_min(torch.finfo(torch.float64).tiny)
    local = offset / share
    position = centre + local
    mean = (mass * position).sum(1) / total
    within = (square - mass * local * local).clamp_min(0.0)
    between = mass * (position - mean[:, None]).square()
    return mean, (within + between).sum(1) / total
