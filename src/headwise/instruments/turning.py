"""What an attention's rotary embedding does to a head's features, as a matrix."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models import UnsupportedModelError
from headwise.models.structure import AttentionView, ModelView
from headwise.parts import Attention, Rotary

__all__ = ["turned_between", "turns"]


def turns(view: ModelView, attention: AttentionView) -> bool:
    """Whether queries and keys of this attention are turned by their positions."""
    if isinstance(attention.module, Attention):
        return isinstance(attention.module.position, Rotary)
    if getattr(attention.module, "use_rope", True) in (False, 0):  # a layer without positions
        return False
    return _rotary_of(view, attention) is not None


def turned_between(view: ModelView, attention: AttentionView, offset: int) -> Tensor:
    """T `(head_dim, head_dim)`, float64: a query and a key that stands `offset` tokens before it
    have the score q^T T k (times the scale) where q, k are as projected.

    The model's own rotation is asked what it does to unit vectors, so that half and interleaved
    pairs, parts that do not turn, and stretched frequencies come out as they are.

    Raises UnsupportedModelError where it cannot be asked.
    """
    eye = torch.eye(attention.head_dim)
    if isinstance(attention.module, Attention):
        query, key = (_built(attention.module, eye, at) for at in (offset, 0))
    else:
        query, key = (_transformers(view, attention, eye, at) for at in (offset, 0))
    # row i of each is where unit vector i goes: q turned is q @ query
    return query.double() @ key.double().mT


def _built(module: Attention, eye: Tensor, at: int) -> Tensor:
    from headwise.parts.position.rotation import turn, wheel

    position = module.position
    assert isinstance(position, Rotary)
    if position.axes > 1:
        raise UnsupportedModelError(f"{position} turns by a grid's axes, not by one offset")
    cos, sin = position.angles(torch.full((len(eye),), at))
    return turn(eye.double(), wheel(cos, sin, position.interleaved), position.interleaved)


def _transformers(view: ModelView, attention: AttentionView, eye: Tensor, at: int) -> Tensor:
    rotary = _rotary_of(view, attention)
    name = type(attention.module).__name__
    apply = getattr(sys.modules[type(attention.module).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        raise UnsupportedModelError(f"{name}: how it turns queries and keys is not known")
    device = next((b.device for b in rotary.buffers()), torch.device("cpu"))
    x = eye.to(device)[None, None]
    positions = torch.full((1, len(eye)), at, device=device)
    kinds = {"layer_type": _layer_type(attention)} if _takes(rotary, "layer_type") else {}
    try:
        with torch.no_grad():
            cos, sin = rotary(x, positions, **kinds)
            width = cos.shape[-1]
            if width < len(eye) and not _passes(apply, x, cos, sin):
                turned = apply(x[..., :width], x[..., :width], cos, sin)[0]
                turned = torch.cat([turned, x[..., width:]], -1)
            else:
                turned = apply(x, x, cos, sin)[0]
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{name}: its rotation is called in a way of its own ({error})"
        ) from error
    if turned.shape != x.shape:
        raise UnsupportedModelError(
            f"{name}: its rotation makes {tuple(turned.shape)} of {x.shape}"
        )
    return turned[0, 0].cpu()


def _passes(apply: Any, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the function lets features through for which there are no angles."""
    try:
        return bool(apply(x, x, cos, sin)[0].shape == x.shape)
    except RuntimeError:
        return False


def _rotary_of(view: ModelView, attention: AttentionView) -> nn.Module | None:
    """The module that holds the frequencies: the attention's own, or that of its stack."""
    for place in (attention.module, view.owners.get(attention.stack), view.model):
        for module in place.modules() if place is not None else ():
            if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
                return module
    return None


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _layer_type(attention: AttentionView) -> Any:
    config: Any = getattr(attention.module, "config", None)
    types = getattr(config, "layer_types", None) or ()
    return types[attention.layer] if attention.layer < len(types) else None
