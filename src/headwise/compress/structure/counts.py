"""What an attention says of its sizes, in agreement with its tensors."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from headwise.models import naming

_WIDTHS = ("all_head_size", "split_size", "inner_dim", "embed_dim")
"""Attributes for the width of all heads together."""

_KEY_VALUE_WIDTHS = ("kv_dim",)


class OwnConfig:
    """A model's config as one attention sees it: some of it is said here, the rest there.

    For attentions that read their number of heads from the config whenever they run.
    """

    def __init__(self, shared: Any, **said: int) -> None:
        self.__dict__["shared"] = shared
        self.__dict__["said"] = said

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "shared" not in self.__dict__:
            raise AttributeError(name)
        said: dict[str, int] = self.__dict__["said"]
        return said[name] if name in said else getattr(self.__dict__["shared"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["shared"], name, value)


def say_counts(module: nn.Module, heads: int, kv_heads: int, group: int, head_dim: int) -> None:
    """Set every attribute that counts heads, and what is derived from them. `group`: by how much
    an attention function has to repeat the key-value heads that it is handed."""
    for name in _present(module, naming.HEADS) or ["num_heads"]:
        setattr(module, name, heads)
    for name in _present(module, naming.KEY_VALUE_HEADS):
        setattr(module, name, kv_heads)
    for name in _present(module, _WIDTHS):
        setattr(module, name, heads * head_dim)
    for name in _present(module, _KEY_VALUE_WIDTHS):
        setattr(module, name, kv_heads * head_dim)
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = group  # type: ignore[assignment]
    read = _read_when_running(module)
    said = {name: heads for name in naming.HEADS if name in read}
    said |= {name: kv_heads for name in naming.KEY_VALUE_HEADS if name in read}
    config: Any = getattr(module, "config", None)
    if said and config is not None:
        shared = config.shared if isinstance(config, OwnConfig) else config
        module.config = OwnConfig(shared, **said)  # type: ignore[assignment]


def _present(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if isinstance(getattr(module, name, None), int)]


def _read_when_running(module: nn.Module) -> set[str]:
    """Names that the forward function uses, if it uses the config at all and has no such
    attribute of its own."""
    code = inspect.unwrap(type(module).forward).__code__
    if "config" not in code.co_names:
        return set()
    return {name for name in code.co_names if not hasattr(module, name)}
