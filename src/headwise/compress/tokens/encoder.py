"""The vision encoder in a model: its layers, the tokens in front, and whether tokens may go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwise.maps import Full
from headwise.models import ModelView, naming
from headwise.models.backbones.stack import Stack
from headwise.models.errors import UnsupportedModelError
from headwise.models.projections import child
from headwise.models.structure import AttentionView, LayerView
from headwise.parts import Attention, Dot, Position, Softmax
from headwise.parts.wiring.pre import PreNorm

NORMS_BEFORE_MLP = (
    "layernorm_after",
    "layer_norm2",
    "norm2",
    "ln_2",
    "ln2",
    "post_attention_layernorm",
)
"""Children of a pre-norm layer that feed its MLP."""

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
MORE_TOKENS = ("distillation_token", "register_tokens")
"""Parameters beside the patch embedding that become tokens in front of the patches."""

BY_POSITION = ("rotary", "rope", "relative_position", "rel_pos")
"""Parts of a module's name that say that attention asks where a token stands."""


@dataclass(frozen=True, eq=False)
class VisionEncoder:
    """`layers` in order; `special`: how many tokens stand before the patches; `has_class`: whether
    the first of them is a class token."""

    layers: tuple[LayerView, ...]
    special: int
    has_class: bool
    view: ModelView

    def attention(self, layer: int) -> AttentionView:
        return self.layers[layer].attentions[0]

    def norm_before_mlp(self, layer: int) -> nn.Module | None:
        """The module that is handed the residual between attention and MLP."""
        one = self.layers[layer]
        owner = self.view.owners.get(one.stack)
        if isinstance(owner, Stack):
            if isinstance(owner.wiring, PreNorm) and owner.fed[owner.weights[layer]]:
                norms: Any = owner.wiring.norms["feed"]
                found: nn.Module = norms[layer]
                return found
            return None
        named = (child(one.module, name) for name in NORMS_BEFORE_MLP)
        return next((norm for norm in named if norm is not None), None)


def vision_encoder(look: ModelView, special: int | None = None) -> VisionEncoder:
    """The encoder of images in a model.

    `special`: tokens in front that always stay, where they cannot be found. Raises
    UnsupportedModelError, naming what is in the way, for layers whose tokens have places that
    attention asks for, that look back only, or that several rows of the batch share.
    """
    name = type(look.model).__name__
    stack = _stack(look)
    layers = tuple(layer for layer in look.layers if layer.stack == stack)
    if len({id(layer.module) for layer in layers}) != len(layers):
        raise UnsupportedModelError(f"{name} runs a layer several times: tokens cannot go there")
    owner = look.owners.get(stack)
    if owner is not None:
        for path, _ in owner.named_modules():
            if any(word in path.lower() for word in BY_POSITION):
                raise UnsupportedModelError(
                    f"{name}: the attention asks where tokens stand ({path}): tokens cannot be "
                    "taken out between its layers"
                )
    if look.family in naming.WINDOWED:
        raise UnsupportedModelError(f"{name} attends in windows of its grid: tokens cannot go")
    for layer in layers:
        _check(name, layer)
    found = _tokens_in_front(look, stack)
    count = found[0] if special is None else special
    return VisionEncoder(layers, count, found[1] and count > 0, look)


def _stack(look: ModelView) -> str:
    if len(look.stacks) == 1:
        return look.stacks[0]
    if "vision" in look.stacks:
        return "vision"
    raise UnsupportedModelError(
        f"{type(look.model).__name__} has the stacks {', '.join(look.stacks)}, none of which is "
        "called vision: hand over the vision encoder alone"
    )


def _check(name: str, layer: LayerView) -> None:
    if len(layer.attentions) != 1 or layer.attentions[0].kind != "self":
        raise UnsupportedModelError(f"{name}, layer {layer.index}: expected one self-attention")
    attention = layer.attentions[0]
    if attention.causal:
        raise UnsupportedModelError(
            f"{name}: {attention.name} looks back only; reduce_tokens is for encoders. For the "
            "keys and values of a decoder there is HeadCache"
        )
    module = attention.module
    if isinstance(module, Attention):
        plain = (
            type(module.position) is Position
            and isinstance(module.score, Dot)
            and isinstance(module.normalize, Softmax)
            and module.choice is None
            and isinstance(module.pattern, Full)
        )
        if not plain:
            raise UnsupportedModelError(
                f"{name}: {attention.name} has a position, pattern, score or normalisation of its "
                f"own ({module!r}): tokens can go only where attention is plain"
            )
    elif any("norm" in path for path, _ in module.named_children()):
        raise UnsupportedModelError(f"{name}: {attention.name} normalises queries and keys")


def _tokens_in_front(look: ModelView, stack: str) -> tuple[int, bool]:
    """How many tokens stand before the patches, and whether the first is a class token."""
    word = "vision" if len(look.stacks) > 1 else ""
    count, first = 0, False
    for path, parameter in look.model.named_parameters():
        last = path.rpartition(".")[2]
        if word not in path or last not in (*CLASS_TOKENS, *MORE_TOKENS):
            continue
        count += _rows(parameter)
        first = first or last in CLASS_TOKENS
    return count, first


def _rows(parameter: Tensor) -> int:
    return 1 if parameter.dim() == 1 else parameter.shape[-2]
