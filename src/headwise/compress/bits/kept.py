"""Activations kept for the backward pass in few bits: memory of training, at exact losses.

The forward pass is as it is; what PyTorch keeps for gradients is rounded, x ~ low + step * code,
with a low and a step for each head of an attention, or for each group of channels, as running
estimates (Mesa, arXiv 2111.11124, sections 3.1 to 3.3). Parameters and small tensors are kept as
they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Kept", "KeptInBits", "unpacked"]

SMALL = 1024
"""Numbers below which a tensor is kept as it is."""


@dataclass(frozen=True, eq=False)
class Kept:
    """codes, low and step `(..., 1)` by group, and the shape that was kept."""

    codes: Tensor
    low: Tensor
    step: Tensor
    dtype: torch.dtype


class KeptInBits:
    """Keeps activations in `bits` bits, 8 at most, within `keeping()`.

        kept = KeptInBits(heads=8)
        with kept.keeping():
            loss = model(**batch).loss
        loss.backward()

    `heads`: groups of a tensor's second dimension where it is `(batch, heads, ., .)`, of its
    channels elsewhere; by_head=False has one group for a tensor. `memory`: lambda of the running
    estimates; 1 keeps those of the first batch. `bytes`: what was kept in the last `keeping()`,
    `plain_bytes`: what would have been. The model must keep its tensors in the same order in every
    pass. Fused attention kernels make their maps again from the queries and keys that they kept:
    maps of rounded ones; written-out ("eager") attention keeps the map itself, as the paper does.
    """

    def __init__(
        self, heads: int, bits: int = 8, by_head: bool = True, memory: float = 0.9
    ) -> None:
        self.heads, self.bits, self.by_head, self.memory = heads, bits, by_head, memory
        self.ranges: dict[int, tuple[Tensor, Tensor]] = {}
        self.bytes = self.plain_bytes = 0

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A forward pass whose backward pass may come later."""
        run = _Pass(self)
        self.bytes = self.plain_bytes = 0
        with torch.autograd.graph.saved_tensors_hooks(run.keep, unpacked):
            yield

    def codes(self, x: Tensor, number: int) -> Kept:
        """x in codes; `number`: which of the pass's tensors it is."""
        groups = self.heads if self.by_head else 1
        lines = x.detach()
        if x.dim() == 4 and x.shape[1] == groups:
            lines = lines.transpose(0, 1)  # heads in front
        elif x.shape[-1] % groups == 0:
            lines = lines.unflatten(-1, (groups, -1)).movedim(-2, 0)
        else:
            lines = lines[None]
        flat = lines.flatten(1)
        low, step = flat.amin(1), (flat.amax(1) - flat.amin(1)).clamp_min(1e-12)
        known = self.ranges.get(number)
        if known is not None and known[0].shape == low.shape:
            low = self.memory * known[0] + (1 - self.memory) * low
            step = self.memory * known[1] + (1 - self.memory) * step
        self.ranges[number] = low, step
        shape = (-1, *(1 for _ in lines.shape[1:]))
        top = 2**self.bits - 1
        low, step = low.view(shape), step.view(shape) / top
        codes = ((lines - low) / step).round_().clamp_(0, top).to(torch.uint8)
        if x.dim() == 4 and x.shape[1] == groups:
            return Kept(codes.transpose(0, 1), low.transpose(0, 1), step.transpose(0, 1), x.dtype)
        if x.shape[-1] % groups == 0:
            codes = codes.movedim(0, -2)
            low, step = (each.movedim(0, -2) for each in (low, step))
        return Kept(codes, low, step, x.dtype)


@dataclass(eq=False)
class _Pass:
    """One forward pass. What is kept several times over is kept once."""

    keeper: KeptInBits
    count: int = 0
    known: dict[Any, tuple[StorageWeakRef, Any]] = field(default_factory=dict)

    def keep(self, x: Tensor) -> Any:
        storage = x.untyped_storage()
        key = (storage.data_ptr(), x.storage_offset(), x.shape, x.stride(), x._version)
        found = self.known.get(key)
        if found is not None and not found[0].expired():
            return found[1]
        if x.is_leaf and x.requires_grad:  # a parameter, which is there anyhow
            return x
        small = not x.is_floating_point() or x.numel() < SMALL
        self.keeper.plain_bytes += x.nbytes
        if small:
            self.keeper.bytes += x.nbytes
            return x
        self.count += 1
        kept = self.keeper.codes(x, self.count)
        self.keeper.bytes += sum(t.nbytes for t in (kept.codes, kept.low, kept.step))
        self.known[key] = StorageWeakRef(storage), (kept, x.shape)
        return kept, x.shape


def unpacked(kept: Any) -> Tensor:
    """The tensor again, for the backward pass."""
    if isinstance(kept, Tensor):
        return kept
    held, shape = kept
    return (held.low + held.step * held.codes).to(held.dtype).reshape(shape)
