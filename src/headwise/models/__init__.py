"""Existing models as they come: where their heads and weights are, and what their heads do.

    m = headwise.models.view(model)
    with headwise.models.observe(m, read=print):
        model(**inputs)

Loaded lazily: neither torch nor transformers is imported before it is needed.
"""

from typing import TYPE_CHECKING

from headwise.lazy import names_of

if TYPE_CHECKING:
    from headwise.models.discovery import view
    from headwise.models.errors import (
        UnknownAttentionArgumentError,
        UnobservedError,
        UnsupportedModelError,
    )
    from headwise.models.observation import observe
    from headwise.models.prefix import Prefix
    from headwise.models.reading import AttentionReading, LayerReading
    from headwise.models.sites import Site, recording, sites_of, touching
    from headwise.models.structure import AttentionView, LayerView, ModelView

_EXPORTS = {
    "AttentionReading": "headwise.models.reading",
    "AttentionView": "headwise.models.structure",
    "LayerReading": "headwise.models.reading",
    "LayerView": "headwise.models.structure",
    "ModelView": "headwise.models.structure",
    "Prefix": "headwise.models.prefix",
    "Site": "headwise.models.sites",
    "UnknownAttentionArgumentError": "headwise.models.errors",
    "UnobservedError": "headwise.models.errors",
    "UnsupportedModelError": "headwise.models.errors",
    "observe": "headwise.models.observation",
    "recording": "headwise.models.sites",
    "sites_of": "headwise.models.sites",
    "touching": "headwise.models.sites",
    "view": "headwise.models.discovery",
}

__all__ = [
    "AttentionReading",
    "AttentionView",
    "LayerReading",
    "LayerView",
    "ModelView",
    "Prefix",
    "Site",
    "UnknownAttentionArgumentError",
    "UnobservedError",
    "UnsupportedModelError",
    "observe",
    "recording",
    "sites_of",
    "touching",
    "view",
]


__getattr__, __dir__ = names_of(__name__, _EXPORTS)
