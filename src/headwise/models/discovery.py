"""`view`: find the layers, attentions, norms and MLPs of a model by their shape and names.

Attentions are the modules whose forward calls transformers' attention interface, and those
whose children carry the names of attention projections. Layers are the elements of the list
that an attention sits in; a stack is such a list.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import Any

from torch import nn

from headwise.models import built, naming, projections, stacked
from headwise.models.backbones.stack import Stack
from headwise.models.errors import UnsupportedModelError
from headwise.models.stacks import (
    Place,
    last_number,
    looks_back,
    parent_path,
    place_of,
    stack_labels,
)
from headwise.models.structure import AttentionView, LayerView, ModelView
from headwise.parts import Attention


def view(model: nn.Module) -> ModelView:
    """Where the layers, heads and weights of `model` are. Nothing is converted, copied or changed.

    Works on Hugging Face models as they come and on any module whose parts carry the usual names.

    Raises UnsupportedModelError when no attention is found, and for models whose attention runs
    on windows folded into the batch (Swin).
    """
    modules = dict(model.named_modules())
    _refuse_windows(model, modules)
    places = [
        place
        for name in _attention_names(modules)
        for place in stacked.places(name, modules) or [place_of(name, modules)]
    ]
    if not places:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no attention was found. No module calls transformers' "
            "attention interface, and none has children named as query, key and value "
            "projections usually are"
        )
    family = getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__
    schedule = naming.SHARED_LAYERS.get(family)
    lists = list(dict.fromkeys(place.outer if schedule else place.list for place in places))
    labels = stack_labels(lists, places, modules)
    layers: list[LayerView] = []
    for path in lists:
        mine = [p for p in places if path == (p.outer if schedule else p.list)]
        order = schedule(model.config) if schedule else None
        for index, name in enumerate(_layer_names(path, mine, modules, order)):
            inside = [p for p in mine if p.layer == name]
            number = index if order or not name.split(".")[-1].isdigit() else last_number(name)
            layers.append(_layer(modules, name, number, labels[path], inside, family))
    attentions = tuple(a for layer in layers for a in layer.attentions)
    spoken = [label for label in ("decoder", "text") if label in labels.values()]
    output = spoken[0] if spoken else labels[lists[-1]]
    where = next(path for path in lists if labels[path] == output)
    own = [a for a in attentions if a.stack == output and a.kind == "self"]
    return ModelView(
        model=model,
        family=family,
        attentions=attentions,
        layers=tuple(layers),
        width=(own or list(attentions))[0].width,
        causal=bool(own) and all(a.causal for a in own),
        stacks=tuple(labels[path] for path in lists),
        final_norm=_final_norm(where, modules),
        owners={labels[path]: modules[parent_path(path)] for path in lists},
    )


def _attention_names(modules: dict[str, nn.Module]) -> list[str]:
    """Paths of the attentions; what is inside one that was built from parts is part of it."""
    whole = tuple(f"{name}." for name, module in modules.items() if built.is_built(module))
    return [n for n, m in modules.items() if is_attention(m) and not n.startswith(whole)]


def is_attention(module: nn.Module) -> bool:
    return built.is_built(module) or routes(module) or projections.has_projections(module)


def routes(module: nn.Module) -> bool:
    """Whether the module's forward refers to an attention interface of transformers.

    Decided by what the function's code refers to, not by names or versions: whatever a model
    calls its table of attention functions, it has to be an AttentionInterface.
    """
    if "transformers" not in sys.modules:
        return False
    from transformers import AttentionInterface

    function = inspect.unwrap(type(module).forward)
    code, scope = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    return code is not None and any(
        isinstance(scope.get(name), AttentionInterface) for name in code.co_names
    )


def _layer_names(
    path: str,
    places: list[Place],
    modules: dict[str, nn.Module],
    order: list[tuple[int, int]] | None,
) -> list[str]:
    """Paths of the layers of a stack in the order in which they run."""
    if order is not None:
        nested = {tuple(int(s) for s in p.layer.split(".") if s.isdigit()): p.layer for p in places}
        return [nested[key] for key in order]
    container = modules[path]
    if isinstance(container, nn.ModuleList):
        return [f"{path}.{index}" for index in range(len(container))]
    return [path]


def _layer(
    modules: dict[str, nn.Module],
    name: str,
    index: int,
    stack: str,
    places: list[Place],
    family: str,
) -> LayerView:
    layer = modules[name]
    found = [_attention(modules, place, index, stack, family) for place in places]
    found.sort(key=lambda attention: attention.kind == "cross")
    owner = modules[parent_path(parent_path(name))]
    if isinstance(owner, Stack):
        return stacked.layer(owner, layer, index, stack, found, modules)
    mlp = _mlp(layer)
    after_attention, after_mlp = _norms_after(layer)
    attention_ends: tuple[nn.Module, ...] = tuple(_end(attention) for attention in found)
    spread = (projections.child(layer, end) for end in naming.MLP_ENDS)
    mlp_ends = (mlp,) if mlp is not None else tuple(m for m in spread if m is not None)[:1]
    if mlp is not None and "residual" in inspect.signature(type(mlp).forward).parameters:
        # it adds the residual itself (BLOOM, MPT): what it adds to is not what it adds
        inside = (projections.child(mlp, name) for name in naming.DOWN)
        mlp_ends = tuple(m for m in inside if m is not None)[:1]
    if after_attention is not None and after_mlp is not None:
        attention_ends, mlp_ends = (after_attention,), (after_mlp,)
    return LayerView(index, stack, layer, tuple(found), mlp, attention_ends, mlp_ends)


def _attention(
    modules: dict[str, nn.Module], place: Place, index: int, stack: str, family: str
) -> AttentionView:
    module = modules[place.name]
    if isinstance(module, Attention):
        norm = _norm(modules[place.layer], modules.get(parent_path(place.name)), False, family)
        return replace(built.describe(module, place, index, stack), norm=norm)
    config = getattr(module, "config", None) or _nearest_config(place.name, modules)
    parent = modules.get(parent_path(place.name))
    found = projections.find(module, parent, config, family)
    if isinstance(found, str):
        heads = projections.count(naming.HEADS, module, config)
        if heads is None:
            raise UnsupportedModelError(f"{place.name}: {found}")
        kv_heads = projections.count(naming.KEY_VALUE_HEADS, module, config) or heads
        width = projections.count(("hidden_size", "d_model"), config, module) or 0
        head_dim = projections.count(naming.HEAD_DIM, module, config) or width // heads
    else:
        heads, kv_heads = found.query.heads, found.key.seen
        head_dim, width = found.query.head_dim, found.query.weight.shape[-1]
    below = place.name[len(place.layer) :]
    cross = getattr(module, "is_cross_attention", False) or any(
        part in naming.CROSS for part in below.split(".")
    )
    observable = None
    if not routes(module):
        observable = (
            f"{type(module).__name__} computes its attention by itself and does not call "
            "transformers' attention interface"
        )
    return AttentionView(
        name=place.name,
        module=module,
        layer=index,
        stack=stack,
        kind="cross" if cross else "self",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        width=width,
        norm=_norm(modules[place.layer], parent, bool(cross), family),
        causal=not cross and looks_back(module, modules[""]),
        projections=found,
        observable=observable,
    )


def _nearest_config(name: str, modules: dict[str, nn.Module]) -> Any:
    while name:
        name = parent_path(name)
        config = getattr(modules[name], "config", None)
        if config is not None:
            return config
    return None


def _norm(layer: nn.Module, parent: nn.Module | None, cross: bool, family: str) -> nn.Module | None:
    if family in naming.NORM_AFTER_ADDING or getattr(layer, "do_layer_norm_before", True) is False:
        return None
    names = naming.NORMS_BEFORE_CROSS if cross else naming.NORMS_BEFORE
    for place in (parent, layer):
        for name in names:
            found = projections.child(place, name) if place is not None else None
            if found is not None:
                return None if isinstance(found, nn.Identity) else found
    return None


def _norms_after(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    for pair in naming.NORMS_AFTER:
        attention, mlp = (projections.child(layer, name) for name in pair)
        if attention is not None and mlp is not None:
            return attention, mlp
    return None, None


def _end(attention: AttentionView) -> nn.Module:
    found = attention.projections
    if isinstance(found, str) or found.output is None:
        return attention.module
    return found.output


def _mlp(layer: nn.Module) -> nn.Module | None:
    for name, module in layer.named_modules():
        holds = any(True for _ in (*module.parameters(), *module.buffers()))  # or codes
        is_one = holds and not projections.is_projection(module)
        if name.rpartition(".")[2] in naming.MLPS and is_one:
            return module
    return None


def _final_norm(path: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    owner = parent_path(path)
    if isinstance(stack := modules[owner], Stack):
        return stacked.final_norm(stack)
    for place in dict.fromkeys((owner, parent_path(owner))):
        for name in naming.FINAL_NORMS:
            found = projections.child(modules[place], name)
            if found is not None:
                return found
    return None


def _refuse_windows(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if kind in naming.WINDOWED:
            part = f" (its part {name!r} is {type(module).__name__})" if name else ""
            raise UnsupportedModelError(
                f"{type(model).__name__}{part}: attention runs inside image windows that are "
                "folded into the batch and shifted in every other layer, so what it calls a "
                "position is no position in the sequence; measures by token would be wrong"
            )
