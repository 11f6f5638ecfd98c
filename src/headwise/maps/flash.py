"""Attention by fused kernels: bands of keys cut into pieces that a kernel knows.

A kernel knows two shapes, everything and the square causal triangle. Chunks of queries against a
longer cache, padded batches and the transposed map are put together from those two: the
log-sum-exps of disjoint key ranges merge exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.maps import kernels, windows
from headwise.maps.masks import KeyMask, Padding, runs
from headwise.maps.pattern import And, Full, Pattern, Window
from headwise.maps.scores import Alibi, Scores

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class Band:
    """A pattern that is a band around the diagonal over one run of keys in each sequence.

    `left`, `right` as in Window; `keys`: (first, last + 1) for every sequence, or one for all.
    """

    left: int | None
    right: int | None
    keys: tuple[tuple[int, int], ...]


def band_of(pattern: Pattern, n_k: int) -> Band | None:
    """The band that `pattern` is, or None where it is none."""
    if isinstance(pattern, Full):
        return Band(None, None, ((0, n_k),))
    if isinstance(pattern, Window):
        return Band(pattern.left, pattern.right, ((0, n_k),))
    if isinstance(pattern, Padding):
        lengths = [int(n) for n in pattern.lengths.reshape(-1)]
        keys = tuple((n_k - n, n_k) if pattern.left else (0, n) for n in lengths)
        return Band(None, None, keys)
    if isinstance(pattern, KeyMask):
        rows = pattern.keys if pattern.keys.dim() == 2 else pattern.keys[None]
        found = [runs(row, sure=True) or ((0, 0),) for row in rows]
        if any(len(row) > 1 for row in found) or any(
            row == ((0, 0),) and bool(mask.any()) for row, mask in zip(found, rows, strict=True)
        ):
            return None
        return Band(None, None, tuple(row[0] for row in found))
    if isinstance(pattern, And):
        a, b = band_of(pattern.a, n_k), band_of(pattern.b, n_k)
        if a is None or b is None:
            return None
        size = max(len(a.keys), len(b.keys))
        mine, theirs = (x.keys if len(x.keys) == size else x.keys * size for x in (a, b))
        both = zip(mine, theirs, strict=True)
        runs_of_both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in both)
        left = min((x.left for x in (a, b) if x.left is not None), default=None)
        right = min((x.right for x in (a, b) if x.right is not None), default=None)
        return Band(left, right, runs_of_both)
    return None


def why_not(scores: Scores, gradients: bool = False) -> str | None:
    """None where the fused kernels compute this map, otherwise the reason why not.

    `gradients`: whether the result is to be differentiated.
    """
    if scores.softcap is not None:
        return "soft-capped scores are not a plain product"
    if isinstance(scores.bias, Alibi):
        if not (isinstance(scores.pattern, Window) and scores.pattern.right == 0):
            return "ALiBi folds into the product only under a causal pattern"
    elif scores.bias is not None:
        return "an additive bias table does not fold into the product"
    band = band_of(scores.pattern, scores.n_k)
    if band is None:
        return f"{scores.pattern!r} is not a band over one run of keys"
    limited = not (band.left is None and band.right in (0, None))
    if limited and scores.device.type != "cpu":
        return f"the fused kernels on {scores.device.type} take no window here: tiles skip it"
    if limited and gradients:
        return "blocks of a window are written in place: gradients go through the tiles"
    if scores.n_k == 0 or scores.n_q == 0:
        return "there is nothing to compute"
    return kernels.why_not(scores.device, scores.q.dtype, scores.q.shape[-1])


def fold_bias(scores: Scores) -> tuple[Tensor, Tensor, float]:
    """(q, k, scale) with a bilinear bias folded in as extra coordinates."""
    if not isinstance(scores.bias, Alibi):
        return scores.q, scores.k, scores.scale
    # scale q.k - slope i + slope j = scale [q, -slope i / scale, slope / scale] . [k, 1, j]
    slopes = torch.tensor(scores.bias.slopes, device=scores.device, dtype=scores.dtype)
    slopes = slopes[:, None] / scores.scale
    dtype = scores.dtype
    i = scores.positions().to(dtype)
    j = torch.arange(scores.n_k, device=scores.device, dtype=dtype)
    left = torch.stack([-slopes * i, slopes.expand(-1, len(i))], -1)
    right = torch.stack([torch.ones_like(j), j], -1)
    q = torch.cat([scores.q.to(dtype), left.expand(scores.batch, -1, -1, -1)], -1)
    k = torch.cat([scores.k.to(dtype), right.expand(scores.batch, scores.kv_heads, -1, -1)], -1)
    return q, k, scores.scale


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Combine (out, lse) of two disjoint key ranges: exact."""
    lse = torch.logaddexp(a[1], b[1])
    safe = lse.masked_fill(lse == NEGATIVE_INFINITY, 0.0)
    wa, wb = ((x[1] - safe).exp()[..., None].to(x[0].dtype) for x in (a, b))
    return a[0] * wa + b[0] * wb, lse


def band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: tuple[int | None, int | None],
    offset: int,
    keys: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """(out, lse) over keys [first, last) inside a window, the query of row r at r + offset.

    `window`: (left, right) as in Window. Rows whose window holds none of the keys see nothing.
    """
    n_q = q.shape[2]
    first, last = keys
    left, right = window
    if not (left is None and right in (0, None)):
        far = n_q + k.shape[2]
        left, right = (far if x is None else min(x, far) for x in window)
        if first >= last or left + right <= 0:
            return _nothing(q, v)
        some = k[:, :, first:last], v[:, :, first:last]
        return windows.attend(q, *some, scale, left, right, offset - first)
    if right is None:
        if first >= last:
            return _nothing(q, v)
        return kernels.flash(q, k[:, :, first:last], v[:, :, first:last], scale, False)
    begin = min(max(first - offset, 0), n_q)  # first row that sees a key
    end = min(max(last - offset, begin), n_q)  # first row behind the last key
    if first >= last:
        begin = end = n_q
    parts = []
    if begin:
        parts.append(_nothing(q[:, :, :begin], v))
    if end > begin:
        at = begin + offset  # position of the first of these rows, and its own key
        stop = end + offset
        part = kernels.flash(q[:, :, begin:end], k[:, :, at:stop], v[:, :, at:stop], scale, True)
        if at > first:
            before = kernels.flash(
                q[:, :, begin:end], k[:, :, first:at], v[:, :, first:at], scale, False
            )
            part = merge(part, before)
        parts.append(part)
    if end < n_q:
        if first >= last:
            parts.append(_nothing(q[:, :, end:], v))
        else:
            rest = q[:, :, end:], k[:, :, first:last], v[:, :, first:last]
            parts.append(kernels.flash(*rest, scale, False))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)


def _nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    lse = torch.full(q.shape[:3], NEGATIVE_INFINITY, device=q.device, dtype=torch.float32)
    return out, lse.to(torch.float64) if q.dtype == torch.float64 else lse


def attend(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    """out `(batch, heads, n_q, d_v)` in the inputs' type and lse; see `why_not` first."""
    q, k, scale = fold_bias(scores)
    v = v.to(q.dtype)
    shape = band_of(scores.pattern, scores.n_k)
    assert shape is not None  # why_not has been asked
    window = shape.left, shape.right
    if len(set(shape.keys)) == 1:
        out, lse = band(q, k, v, scale, window, scores.offset, shape.keys[0])
    else:
        parts = [
            band(q[b : b + 1], k[b : b + 1], v[b : b + 1], scale, window, scores.offset, keys)
            for b, keys in enumerate(shape.keys)
        ]
        out, lse = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if scores.sinks is not None:
        whole = torch.logaddexp(lse, scores.sinks.to(lse.dtype)[None, :, None])
        out, lse = out * (lse - whole).exp()[..., None].to(out.dtype), whole
    return out, lse
