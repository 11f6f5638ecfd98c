"""Maps without matrices: exact attention and exact statistics of it. Pure tensors, no model."""

from headwise.maps.attend import Plan, attend, explain
from headwise.maps.map import AttentionMap
from headwise.maps.pattern import (
    And,
    Causal,
    Dilated,
    Documents,
    Full,
    KeyMask,
    Mask,
    Not,
    Or,
    Padding,
    Pattern,
    Predicate,
    Sinks,
    Window,
)
from headwise.maps.scores import Alibi, Bias
from headwise.maps.summary import MapSummary

__all__ = [
    "Alibi",
    "And",
    "AttentionMap",
    "Bias",
    "Causal",
    "Dilated",
    "Documents",
    "Full",
    "KeyMask",
    "MapSummary",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "Pattern",
    "Plan",
    "Predicate",
    "Sinks",
    "Window",
    "attend",
    "explain",
]
