"""Numbers of a few bits, several to a byte, and the asymmetric quantiser that makes them.

A group of numbers is cut evenly between its least and its largest: x is held as a code of `bits`
bits, x ~ low + scale * code, with scale = (largest - least) / (2 ** bits - 1). Low is rounded down
and scale up to the type that they are kept in, so that the group stays covered and the error of
one number is at most half a scale (and the rounding of float32), whatever that type is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 8)
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def packed_size(n: int, bits: int) -> int:
    """Bytes that n codes of `bits` bits take."""
    per, width = _layout(bits)
    return -(-n // per) * width


def pack(codes: Tensor, bits: int) -> Tensor:
    """`(..., n)` codes below 2 ** bits as uint8 to `(..., packed_size(n, bits))` uint8.

    Codes that share a byte lie n / per places apart, so that taking them out writes whole runs.
    Raises ValueError for bits other than 1, 2, 3, 4, 8.
    """
    per, width = _layout(bits)
    n = codes.shape[-1]
    run = -(-n // per)
    if run * per > n:
        codes = torch.nn.functional.pad(codes, (0, run * per - n))
    lanes = codes.unflatten(-1, (per, run)).unbind(-2)
    if width == 1:
        packed = lanes[0].clone()
        for at, lane in enumerate(lanes[1:], 1):
            packed |= lane << (at * bits)
        return packed
    word = torch.zeros_like(lanes[0], dtype=torch.int32)
    for at, lane in enumerate(lanes):
        word |= lane.int() << (at * bits)
    return torch.cat([(word >> (8 * byte) & 255).to(torch.uint8) for byte in range(width)], -1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The codes `(..., n)` as uint8, exactly what `pack` was given.

    Raises ValueError where `packed` cannot hold n codes of `bits` bits.
    """
    per, width = _layout(bits)
    if packed.shape[-1] != packed_size(n, bits):
        raise ValueError(
            f"{packed.shape[-1]} bytes were given for {n} codes of {bits} bits, which take "
            f"{packed_size(n, bits)}"
        )
    if bits == 8:
        return packed
    top = (1 << bits) - 1
    if width == 1:
        lanes = [packed >> (at * bits) & top for at in range(per - 1)]
        lanes.append(packed >> ((per - 1) * bits))
    else:
        parts = packed.int().chunk(width, -1)
        word = parts[0].clone()
        for byte, part in enumerate(parts[1:], 1):
            word |= part << (8 * byte)
        lanes = [(word >> (at * bits) & top).to(torch.uint8) for at in range(per)]
    codes = torch.cat(lanes, -1)
    return codes if codes.shape[-1] == n else codes[..., :n]


def _layout(bits: int) -> tuple[int, int]:
    """How many codes share how many bytes."""
    if bits not in BITS:
        raise ValueError(f"bits={bits!r}: expected one of {', '.join(map(str, BITS))}")
    return (8, 3) if bits == 3 else (8 // bits, 1)


def ranges(
    least: Tensor, largest: Tensor, bits: int, scales: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """(low, scale) in the type `scales`, so that codes 0 to 2 ** bits - 1 cover every group.

    Raises ValueError for a type that is none of float16, bfloat16, float32, and for numbers that
    it cannot hold.
    """
    if scales not in SCALES:
        raise ValueError(f"scales={scales}: expected one of {', '.join(map(str, SCALES))}")
    least, largest = least.float(), largest.float()
    low = _outward(least, scales, down=True)
    scale = _outward((largest - low.float()) / (2**bits - 1), scales, down=False)
    if not bool((low.isfinite() & scale.isfinite()).all()):
        raise ValueError(
            f"numbers between {float(least.min()):g} and {float(largest.max()):g} do not fit "
            f"scales of {scales}: take scales=torch.float32"
        )
    return low, scale


def _outward(x: Tensor, dtype: torch.dtype, down: bool) -> Tensor:
    """x in another type, rounded down or up."""
    near = x.to(dtype)
    if dtype == torch.float32:
        return near
    info = torch.finfo(dtype)
    step = x.abs() * info.eps + info.smallest_normal * info.eps  # one place of the last digit
    next_one = (x - step if down else x + step).to(dtype)
    wrong = near.float() > x if down else near.float() < x
    return torch.where(wrong, next_one, near)


def encode(x: Tensor, low: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of x as uint8; low and scale broadcast against it."""
    scale = scale.float()
    steps = (x.float() - low.float()) / torch.where(scale > 0, scale, 1.0)
    return steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, low: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """low + scale * code, computed in `dtype` if that is a float32 or wider, else in float32."""
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return torch.addcmul(low.to(wide), scale.to(wide), codes.to(wide)).to(dtype)


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in codes. `codes`: groups along the last place, packed; `low`, `scale`: one for
    every group, `(..., groups, 1)`. `shape`, `dtype`: of the tensor; `dim`: along which it was
    cut into groups of `group`."""

    codes: Tensor
    low: Tensor
    scale: Tensor
    bits: int
    dim: int
    group: int
    shape: torch.Size
    dtype: torch.dtype

    def nbytes(self) -> int:
        """Bytes of codes, lows and scales."""
        return self.codes.nbytes + self.low.nbytes + self.scale.nbytes


def quantise(
    x: Tensor,
    bits: int,
    dim: int = -1,
    group: int | None = None,
    scales: torch.dtype = torch.float16,
) -> Packed:
    """x in codes of `bits` bits, with a low and a scale for every `group` neighbours along `dim`
    (None: all of them). The last group may be shorter.

    Raises ValueError for bits, groups and scales that cannot be, and for an x without numbers.
    """
    _layout(bits)
    if x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} and {x.dtype} cannot be quantised")
    size = x.shape[dim]
    group = size if group is None else group
    if group < 1:
        raise ValueError(f"group={group}: expected 1 or more numbers")
    group = min(group, size)
    lines = x.movedim(dim, -1)
    if size % group:  # the last number again: it widens no range
        last = lines[..., -1:].expand(*lines.shape[:-1], group - size % group)
        lines = torch.cat([lines, last], -1)
    lines = lines.unflatten(-1, (-1, group))
    low, scale = ranges(lines.amin(-1, True), lines.amax(-1, True), bits, scales)
    codes = pack(encode(lines, low, scale, bits), bits)
    return Packed(codes, low, scale, bits, dim, group, x.shape, x.dtype)


def dequantise(packed: Packed) -> Tensor:
    """The tensor again, every number within half a scale of what it was."""
    codes = unpack(packed.codes, packed.bits, packed.group)
    lines = decode(codes, packed.low, packed.scale, packed.dtype).flatten(-2)
    return lines[..., : packed.shape[packed.dim]].movedim(-1, packed.dim)
