"""Which attention implementation a model's modules have, and had before ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Held:
    config: Any
    before: str | None
    holders: int = 0
    caches: int = 0
    """Holders that are caches: attentions are then called that nobody observes or edits."""


HELD: dict[int, Held] = {}
"""id of a config -> what it said, and how many hold it."""


def implementation(module: nn.Module) -> str:
    """The attention implementation that a module's config names, or named before ours."""
    config = config_of(module)
    return held_before(config) or getattr(config, "_attn_implementation", None) or "eager"


def held_before(config: Any) -> str | None:
    """What this config named before ours; None where ours is not in its place."""
    held = HELD.get(id(config))
    return None if held is None else held.before or "eager"


def serves_caches(module: nn.Module) -> bool:
    """Whether our attention is a module's because a cache is alive."""
    held = HELD.get(id(config_of(module)))
    return held is not None and held.caches > 0


def config_of(module: nn.Module) -> Any:
    """The config of a module that names an attention implementation, or None."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None


def configs(model: nn.Module) -> list[Any]:
    """Every config in use, with its sub-configs."""
    found: dict[int, Any] = {}
    waiting = [c for module in model.modules() if (c := config_of(module)) is not None]
    while waiting:
        config = waiting.pop()
        if id(config) in found:
            continue
        found[id(config)] = config
        subs = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        waiting += [sub for sub in subs if hasattr(sub, "_attn_implementation")]
    return list(found.values())
