"""Existing models as they come: where their heads and weights are, and what their heads do.

    m = headwise.models.view(model)
    with headwise.models.observe(m, read=print):
        model(**inputs)

Loaded lazily: neither torch nor transformers is imported before it is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.models.discovery import view
    from headwise.models.errors import (
        UnknownAttentionArgumentError,
        UnobservedError,
        UnsupportedModelError,
    )
    from headwise.models.observation import observe
    from headwise.models.reading import AttentionReading, LayerReading
    from headwise.models.structure import AttentionView, LayerView, ModelView

_EXPORTS = {
    "AttentionReading": "headwise.models.reading",
    "AttentionView": "headwise.models.structure",
    "LayerReading": "headwise.models.reading",
    "LayerView": "headwise.models.structure",
    "ModelView": "headwise.models.structure",
    "UnknownAttentionArgumentError": "headwise.models.errors",
    "UnobservedError": "headwise.models.errors",
    "UnsupportedModelError": "headwise.models.errors",
    "observe": "headwise.models.observation",
    "view": "headwise.models.discovery",
}

__all__ = [
    "AttentionReading",
    "AttentionView",
    "LayerReading",
    "LayerView",
    "ModelView",
    "UnknownAttentionArgumentError",
    "UnobservedError",
    "UnsupportedModelError",
    "observe",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'headwise.models' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
