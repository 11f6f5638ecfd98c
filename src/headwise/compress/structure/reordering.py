"""Layers in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headwise.compress.step import Step, take
from headwise.compress.structure.depth import say_depth
from headwise.compress.structure.feeds import layers_of
from headwise.compress.structure.recalled import lent
from headwise.instruments.examples import model_view
from headwise.models import ModelView, UnsupportedModelError, view
from headwise.models.backbones.stack import Stack
from headwise.parts.wiring.pre import PreNorm


@dataclass(frozen=True)
class ReorderLayers(Step):
    """Place n is taken by the layer that is number order[n] at that moment. Caches, masks and
    what the config says by layer go along. `stack`: as `headwise.view` calls it."""

    order: tuple[int, ...]
    stack: str | None = None

    def apply(self, model: nn.Module) -> None:
        look = view(model)
        layers = layers_of(look, self.stack)
        if sorted(self.order) != list(range(len(layers))):
            raise ValueError(
                f"order={self.order}: expected each of 0 to {len(layers) - 1} once; to take layers "
                "out see drop_layers"
            )
        owner = look.owners[layers[0].stack]
        if isinstance(owner, Stack):
            _blocks(owner, self.order)
            return
        if len({id(layer.module) for layer in layers}) < len(layers):
            raise UnsupportedModelError("layers of this model are one module, run several times")
        if any(
            getattr(a.module, "has_relative_attention_bias", False)
            for layer in layers
            for a in layer.attentions
        ):
            raise UnsupportedModelError(
                "the first layer of this stack computes the relative biases of all: its layers "
                "cannot change places"
            )
        if getattr(getattr(owner, "config", None), "num_kv_shared_layers", 0):
            raise UnsupportedModelError("layers of this model use keys and values of earlier ones")
        place = {
            id(m): self.order.index(layer.index)
            for layer in layers
            for a in layer.attentions
            for m in a.module.modules()
        }
        if any(place.get(id(b), 0) < place.get(id(a), 0) for a, b in lent(model)):
            raise UnsupportedModelError(
                "a layer would run before the one whose map it shares: reorder first, and share "
                "maps afterwards"
            )
        before: Any
        for module in owner.modules():
            for name, before in list(module._modules.items()):
                if isinstance(before, nn.ModuleList) and any(m is layers[0].module for m in before):
                    setattr(module, name, nn.ModuleList(before[n] for n in self.order))
                    say_depth(look, layers[0].stack, module, len(before), list(self.order))
                    return
        raise UnsupportedModelError(f"the layers of {type(model).__name__} stand in no list")


def reorder_layers(
    model: nn.Module | ModelView, order: Sequence[int], stack: str | None = None
) -> None:
    """Put the layers of a stack into another order, for good.

        reorder_layers(model, [0, 2, 1, 3])

    Raises ValueError for what is no permutation of the layers, UnsupportedModelError where layers
    depend on their places; the model is then as it was.
    """
    take(model_view(model).model, ReorderLayers(tuple(order), stack))


def _blocks(stack: Stack, order: Sequence[int]) -> None:
    if type(stack.wiring) is not PreNorm or len(set(stack.weights)) < stack.depth:
        raise UnsupportedModelError(
            f"layers of a stack with {type(stack.wiring).__name__} belong to their places"
        )

    def those(modules: Any) -> nn.ModuleList:
        return nn.ModuleList(modules[layer] for layer in order)

    stack.mixers, stack.feeds = those(stack.mixers), those(stack.feeds)
    if len(stack.crosses):
        stack.crosses = those(stack.crosses)
    stack.fed = [stack.fed[layer] for layer in order]
    norms: Any = stack.wiring.norms
    for place in list(norms):
        norms[place] = those(norms[place])
