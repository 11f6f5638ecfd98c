"""In what each layer of a cache stores its entries."""

from __future__ import annotations

from headwise.compress.cache.layer_bits import Bits, codings
from headwise.compress.cache.rules import Maker
from headwise.compress.cache.store import Plain

__all__ = ["Bits", "makers_of"]


def makers_of(bits: Bits, layers: int) -> tuple[Maker, ...]:
    """What makes the stores of each layer; bits as `codings` takes them."""
    return tuple(Plain.make if one is None else one.make for one in codings(bits, layers))
