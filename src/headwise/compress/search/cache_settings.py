"""What makes a HeadCache, written down: plain numbers and names, for a file and for a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from torch import nn

from headwise.compress.cache.budgets import Adaptive, Budget, PerHead, Pyramid, Uniform
from headwise.compress.cache.head_cache import HeadCache
from headwise.compress.cache.policies.accumulated_mass import AccumulatedMass
from headwise.compress.cache.policies.key_norm import KeyNorm
from headwise.compress.cache.policies.observation_window import ObservationWindow
from headwise.compress.cache.policies.recency import SinksAndWindow
from headwise.compress.cache.policies.reconstruction_error import ReconstructionError
from headwise.compress.cache.policy import Policy
from headwise.models import view

POLICIES: dict[str, Callable[[], Policy]] = {
    "sinks and window": SinksAndWindow,
    "accumulated mass": AccumulatedMass,
    # the queries that they look through are bytes of the cache as well
    "observation window": partial(ObservationWindow, window=16),
    "key norm": KeyNorm,
    "reconstruction error": partial(ReconstructionError, window=16),
}
SHAPES = ("uniform", "pyramid", "adaptive", "by layer")


@dataclass(frozen=True)
class CacheSettings:
    """policy: of `POLICIES`. share: of the tokens seen that are kept, mean over rows. shape: of
    `SHAPES`, how it is spread over layers and heads; layers: each layer's share, for "by layer".
    bits: of keys and values, None as the model computes. sinks, window: tokens that always stay.
    step, slack: as in `HeadCache`, small enough that bytes follow the share closely.
    """

    policy: str = "observation window"
    share: float = 1.0
    shape: str = "uniform"
    layers: tuple[float, ...] = ()
    bits: int | None = None
    sinks: int = 4
    window: int = 16
    step: int = 8
    slack: int = 16

    def __post_init__(self) -> None:
        if self.policy not in POLICIES or self.shape not in SHAPES:
            raise ValueError(
                f"policy {self.policy!r}, shape {self.shape!r}: expected one of "
                f"{', '.join(POLICIES)}, and one of {', '.join(SHAPES)}"
            )

    def __str__(self) -> str:
        bits = "" if self.bits is None else f"{self.bits} bits, "
        shares = self.layers or (self.share,)
        if min(shares) >= 1:
            return f"{bits}all tokens"
        mean = sum(shares) / len(shares)
        return f"{bits}{self.policy}, {self.shape} {mean:.3g} of the tokens"

    def budget(self, kv_heads: Sequence[int]) -> Budget:
        """What the cache is told to keep. kv_heads: of each layer."""
        amount = float(min(self.share, 1.0))
        if self.shape == "pyramid" and amount < 1:
            return Pyramid(amount, beta=4.0)
        if self.shape == "adaptive" and amount < 1:
            return Adaptive(amount)
        if self.shape == "by layer":
            rows = zip(self.layers, kv_heads, strict=True)
            return PerHead([[float(min(share, 1.0))] * heads for share, heads in rows])
        return Uniform(amount)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "layers": list(self.layers)}


def settings_of(known: Mapping[str, Any]) -> CacheSettings:
    """From JSON. Raises ValueError for what is no such record."""
    names = {field.name for field in fields(CacheSettings)}
    if set(known) - names:
        raise ValueError(
            f"cache settings with {', '.join(sorted(set(known) - names))}: expected "
            f"{', '.join(sorted(names))}"
        )
    return CacheSettings(**{**known, "layers": tuple(known.get("layers", ()))})


def cache_of(model: nn.Module, settings: CacheSettings | Mapping[str, Any]) -> HeadCache:
    """An empty cache of these settings for the model."""
    asked = settings if isinstance(settings, CacheSettings) else settings_of(settings)
    look = view(model)
    kv_heads = [sum(a.cached_heads for a in layer.attentions) for layer in look.layers]
    return HeadCache(
        model,
        budget=asked.budget(kv_heads),
        policy=POLICIES[asked.policy](),
        bits=asked.bits,
        sinks=asked.sinks,
        window=asked.window,
        step=asked.step,
        slack=asked.slack,
    )


def bytes_of(bits: int | None, width: int) -> float:
    """Share of the bytes that numbers of so many bits take, with their scales, about."""
    return 1.0 if bits is None else (bits + 1.0) / width


def scaled(settings: CacheSettings, by: float) -> CacheSettings:
    """So many times as many tokens, in every layer."""
    layers = tuple(min(1.0, one * by) for one in settings.layers)
    return replace(settings, share=min(1.0, settings.share * by), layers=layers)


def layered(base: CacheSettings, shares: Sequence[float]) -> CacheSettings:
    return replace(base, shape="by layer", layers=tuple(float(share) for share in shares))


def floors_of(
    share_of: Callable[[CacheSettings], float],
    share: float,
    tokens: int,
    allowed: Sequence[int | None],
) -> tuple[int, dict[int | None, float]]:
    """(window, bits -> share that sinks and window alone hold): the window of at most 16 tokens
    with which that is at most `share`, or else the smallest."""
    window = max(4, min(16, int(tokens * share) // 2))
    while True:
        least = CacheSettings("sinks and window", 1e-9, window=window, sinks=4)
        floors = {bits: share_of(replace(least, bits=bits)) for bits in allowed}
        if min(floors.values()) <= share or window == 4:
            return window, floors
        window = max(4, window // 2)
