"""Routers that say, for each sequence, which attentions it does without.

    route_attention(model)                          # all open: the model computes what it did
    ... train router_parameters(model) on: loss + price * relu(open_share(model) - 0.5)
    model.eval(); model.generate(...)               # closed attentions do not run

Router-Tuning's MindSkip (arXiv 2410.13184, section 3): a linear router reads the mean of the tokens
that enter an attention; where its sigmoid is not above a threshold, the attention is left out for
the whole sequence, and nothing of it is cached. The model itself stays as it is. In training every
sequence runs everything, times a gate of 0 or 1 whose gradient is the sigmoid's (straight-through);
in evaluation mode the sequences that are open are picked out of the batch and run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.compress.step import Step, take
from headwise.compress.structure.routed import RoutedAttention, RoutedMixer, Router
from headwise.instruments.examples import model_view
from headwise.models import ModelView
from headwise.models.errors import UnsupportedModelError
from headwise.models.structure import AttentionView
from headwise.parts import Mixer


@dataclass(frozen=True)
class RouteAttention(Step):
    """`layers`: whose self-attention gets a router with this threshold."""

    layers: tuple[int, ...]
    threshold: float = 0.5

    def apply(self, model: nn.Module) -> None:
        for attention in _checked(model_view(model), self.layers):
            weight = attention.query_weight()
            with torch.device(weight.device):
                router = Router(attention.width, self.threshold).to(weight.dtype)
            inner = attention.module
            routed = RoutedMixer if isinstance(inner, Mixer) else RoutedAttention
            made = routed(inner, router)  # type: ignore[arg-type]
            model.set_submodule(attention.name, made.train(inner.training))


def route_attention(
    model: nn.Module, layers: Sequence[int] | None = None, threshold: float = 0.5
) -> None:
    """Put a router before the self-attention of `layers` (all by default), in place.

    All start open, and the model computes what it did. In evaluation mode a closed attention does
    not run and caches nothing for the sequence (DynamicCache, and the states of our backbones);
    the prompt decides for what is generated after it. `headwise.save` keeps routers.

    Raises ValueError for layers that are not there or have a router; UnsupportedModelError for
    attentions whose width was not found. Nothing is changed then.
    """
    if layers is None:
        layers = [a.layer for a in model_view(model).attentions if a.kind == "self"]
    take(model, RouteAttention(tuple(sorted({int(layer) for layer in layers})), threshold))


def routers_of(model: nn.Module) -> list[Router]:
    """In the order of their layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What router-tuning trains."""
    return [p for router in routers_of(model) for p in router.parameters()]


def open_share(model: nn.Module, hard: bool = False) -> Tensor:
    """Mean over routers and sequences of the last call's sigmoids, with gradients; `hard`: of what
    was open. Raises RuntimeError where a router was not asked."""
    found = []
    for router in routers_of(model):
        if router.soft is None:
            raise RuntimeError("a router was not asked yet: call the model first")
        found.append((router.soft > router.threshold).float() if hard else router.soft)
    if not found:
        raise ValueError(f"{type(model).__name__} has no routers: route_attention(model) first")
    return torch.cat(found).mean()


def _checked(look: ModelView, layers: tuple[int, ...]) -> list[AttentionView]:
    mine = [a for a in look.attentions if a.kind == "self"]
    stacks = dict.fromkeys(a.stack for a in mine)
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{type(look.model).__name__} has the stacks {', '.join(stacks)}: routers are for "
            "models with one"
        )
    by_layer = {a.layer: a for a in mine}
    absent = [layer for layer in layers if layer not in by_layer]
    if absent or not layers:
        raise ValueError(f"layers={layers}: self-attention is in {sorted(by_layer)}")
    routed = {
        id(module)
        for routed in look.model.modules()
        if isinstance(routed, RoutedMixer | RoutedAttention)
        for module in routed.modules()
    }
    for layer in layers:
        if id(by_layer[layer].module) in routed:
            raise ValueError(f"layer {layer} has a router already")
        by_layer[layer].query_weight()
        reason = by_layer[layer].observable
        if reason is not None:
            raise UnsupportedModelError(
                f"{by_layer[layer].name}: {reason}, and which of its arguments belong to a "
                "sequence is not known"
            )
    return [by_layer[layer] for layer in layers]
