"""Layers that are gone, whole or without their attention or feed-forward part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from headwise.compress.step import Step, take
from headwise.compress.structure.depth import say_depth
from headwise.compress.structure.feeds import feed_forward, layers_of
from headwise.compress.structure.nothing import NoFeedForward, NoMixer
from headwise.compress.structure.recalled import lent
from headwise.compress.structure.relative import move_table
from headwise.compress.structure.slicing import check_sliceable, keep_columns, keep_rows
from headwise.compress.structure.surgery import check_replaceable, put, returns, take_out
from headwise.instruments.examples import model_view
from headwise.models import ModelView, view
from headwise.models.backbones.stack import Stack
from headwise.models.errors import UnsupportedModelError
from headwise.models.structure import AttentionView, LayerView
from headwise.parts import Attention
from headwise.parts.wiring.pre import PreNorm

PARTS = ("layer", "attention", "mlp")


@dataclass(frozen=True)
class DropLayers(Step):
    """Remove layers, numbered as at that moment, or one part of each: `parts` is "layer",
    "attention" (the self-attention) or "mlp". `stack`: as `headwise.view` calls it."""

    layers: tuple[int, ...]
    parts: str = "layer"
    stack: str | None = None

    def apply(self, model: nn.Module) -> None:
        look = view(model)
        gone = _checked(look, self)
        if self.parts == "layer":
            _drop(look, gone)
        elif self.parts == "attention":
            _hand_tables_on(look, _attentions(gone))
            for attention in _attentions(gone):
                _without_attention(look, attention)
        else:
            for layer in gone:
                _without_mlp(model, layer)


def drop_layers(
    model: nn.Module | ModelView,
    layers: Iterable[int],
    *,
    parts: str = "layer",
    stack: str | None = None,
) -> None:
    """Take layers out of a model for good, in place: what a layer got goes on to the next.

        drop_layers(model, [21, 22, 23, 24])
        drop_layers(model, [20, 21], parts="attention")

    parts: "layer", or "attention" or "mlp" for that part alone, which then adds nothing to the
    residual, not even a bias (He et al. 2024, arXiv 2406.15786, drop attentions alone). Layers
    that are left are renumbered, and the config with all its lists by layer says so, so that
    caches, masks and sliding windows are right. stack: needed where the model has several.
    (transformers makes T5's caches as long as its encoder: `generate` of one with fewer encoder
    than decoder layers needs past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()).)

    Raises ValueError for layers that are not there and where none would be left,
    UnsupportedModelError for layers that run several times; the model is then as it was.
    """
    look = model_view(model)
    step = DropLayers(tuple(sorted(set(layers))), parts, stack)
    _checked(look, step)
    take(look.model, step)


def _checked(look: ModelView, step: DropLayers) -> list[LayerView]:
    if step.parts not in PARTS:
        raise ValueError(f"parts={step.parts!r}: expected one of {', '.join(PARTS)}")
    mine = {layer.index: layer for layer in layers_of(look, step.stack)}
    wrong = [at for at in step.layers if at not in mine]
    if wrong:
        raise ValueError(f"layer {wrong[0]}: this stack has layers 0 to {max(mine)}")
    gone = [mine[at] for at in step.layers]
    for layer in gone:
        same = [i for i, one in mine.items() if one.module is layer.module]
        if len(same) > 1:
            raise UnsupportedModelError(
                f"layers {', '.join(map(str, same))} are one and the same module, which is run "
                f"{len(same)} times: there is no layer {layer.index} to take out"
            )
    if step.parts == "layer":
        _droppable(look, gone, mine)
    for layer in gone:
        if step.parts == "mlp":
            feed_forward(layer).check_sliceable() if layer.mlp is None else returns(layer.mlp)
        if step.parts == "attention":
            for attention in _attentions([layer]):
                found = attention.projections
                output = None if isinstance(found, str) else found.output
                if isinstance(attention.module, Attention):
                    continue
                check_replaceable(attention)
                if output is None:
                    raise UnsupportedModelError(
                        f"{attention.name}: no output projection was found, so that it is not "
                        "known what it adds to the residual"
                    )
                if all(one is not output for one in attention.module.modules()):
                    check_sliceable(output, attention.name)
    if step.parts != "mlp":
        _check_lent(look, gone)
    if step.parts == "attention" and len(_attentions(gone)) < len(gone):
        raise ValueError("some of these layers have no self-attention (any more)")
    return gone


def _check_lent(look: ModelView, gone: list[LayerView]) -> None:
    leaving = {id(m) for a in _attentions(gone) for m in a.module.modules()}
    if any(id(one) in leaving and id(other) not in leaving for one, other in lent(look.model)):
        raise UnsupportedModelError(
            f"layers {', '.join(str(layer.index) for layer in gone)}: a later layer shares the map "
            "of one of them and would be left without: take layers out first, and share maps "
            "afterwards"
        )


def _attentions(layers: list[LayerView]) -> list[AttentionView]:
    return [a for layer in layers for a in layer.attentions if a.kind == "self"]


def _droppable(look: ModelView, gone: list[LayerView], mine: dict[int, LayerView]) -> None:
    if len(gone) == len(mine):
        raise ValueError(f"all {len(mine)} layers would go: leave at least one")
    if not gone:
        return
    owner = look.owners[gone[0].stack]
    if isinstance(owner, Stack):
        shared = len(set(owner.weights)) < owner.depth
        if type(owner.wiring) is not PreNorm or shared:
            raise UnsupportedModelError(
                f"layers of a stack with {type(owner.wiring).__name__} belong together: only "
                "those of a PreNorm with weights of their own can be taken out one by one"
            )
        return
    _list_of(owner, gone[0])
    shared_keys = getattr(getattr(owner, "config", None), "num_kv_shared_layers", 0)
    if shared_keys:
        raise UnsupportedModelError(
            f"the last {shared_keys} layers use keys and values of earlier ones: which layers can "
            "do without which is not known"
        )


def _list_of(owner: nn.Module, layer: LayerView) -> tuple[nn.Module, str]:
    """The module and name of the list that holds the layer."""
    for module in owner.modules():
        for name, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and any(one is layer.module for one in child):
                return module, name
    raise UnsupportedModelError(f"layer {layer.index}: it stands in no list of layers")


def _drop(look: ModelView, gone: list[LayerView]) -> None:
    if not gone:
        return
    owner = look.owners[gone[0].stack]
    indices = {layer.index for layer in gone}
    if isinstance(owner, Stack):
        _drop_blocks(owner, indices)
        return
    _hand_tables_on(look, _attentions(gone))
    module, name = _list_of(owner, gone[0])
    before: Any = getattr(module, name)
    kept = [number for number in range(len(before)) if number not in indices]
    setattr(module, name, nn.ModuleList(before[number] for number in kept))
    say_depth(look, gone[0].stack, module, len(before), kept)


def _drop_blocks(stack: Stack, indices: set[int]) -> None:
    kept = [layer for layer in range(stack.depth) if layer not in indices]

    def those(modules: Any) -> nn.ModuleList:
        return nn.ModuleList(modules[layer] for layer in kept)

    stack.mixers, stack.feeds = those(stack.mixers), those(stack.feeds)
    if len(stack.crosses):
        stack.crosses = those(stack.crosses)
    stack.layers = those(stack.layers)
    stack.fed = [stack.fed[layer] for layer in kept]
    norms: Any = stack.wiring.norms
    for place in list(norms):
        norms[place] = those(norms[place])
    stack.depth, stack.weights = len(kept), list(range(len(kept)))


def _hand_tables_on(look: ModelView, leaving: list[AttentionView]) -> None:
    """Relative biases of a stack are computed by its first layer: let the next one do so."""
    out = {id(a.module) for a in leaving}
    for a in leaving:
        if not getattr(a.module, "has_relative_attention_bias", False):
            continue
        heirs = [
            other.module
            for other in look.attentions
            if (other.stack, other.kind) == (a.stack, a.kind) and id(other.module) not in out
        ]
        if heirs and not getattr(heirs[0], "has_relative_attention_bias", False):
            move_table(a.module, heirs[0])


def _without_attention(look: ModelView, attention: AttentionView) -> None:
    module = attention.module
    if isinstance(module, Attention):
        put(look.model, module, NoMixer(module.dim, module.causal))
        return
    found = attention.projections
    assert not isinstance(found, str)
    assert found.output is not None
    take_out(look.model, attention, found.output, biased=False)


def _without_mlp(model: nn.Module, layer: LayerView) -> None:
    if layer.mlp is not None:
        put(model, layer.mlp, NoFeedForward.of(layer.mlp, returns(layer.mlp)))
        return
    feed = feed_forward(layer)
    for up in feed.ups:
        keep_rows(up, [])
    keep_columns(feed.down, [])
    feed.down.register_parameter("bias", None)
