"""In what each layer of a cache stores its entries."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.compress.cache.quantised import Coding
from headwise.compress.cache.rules import Maker
from headwise.compress.cache.store import Plain

Bits = int | Coding | None | Sequence[int | Coding | None]
"""8, 4, 2 ... bits or how to code; None: as they come; or one of these for each layer."""


def makers_of(bits: Bits, layers: int) -> tuple[Maker, ...]:
    """What makes the stores of each layer. Raises ValueError for what cannot be."""
    if bits is None or isinstance(bits, int | Coding):
        return (_maker(bits),) * layers
    if len(bits) != layers:
        raise ValueError(
            f"bits of {len(bits)} layers were given; the model has {layers}: give one for each "
            "(None: as they come), or one for all"
        )
    return tuple(_maker(one) for one in bits)


def _maker(bits: int | Coding | None) -> Maker:
    if bits is None:
        return Plain.make
    return (bits if isinstance(bits, Coding) else Coding(bits, bits)).make
