"""What a model says of its number of layers, in agreement with its lists."""

from __future__ import annotations

from typing import Any

from torch import nn

from headwise.models.implementation import configs
from headwise.models.structure import ModelView

_NUMBERS = ("layer_idx", "layer_id", "layer_index", "block_idx")
_COUNTS = ("n_layers", "num_layers", "n_layer", "num_hidden_layers")
_OF_A_SIDE = {
    "encoder": ("encoder_layers", "encoder_num_hidden_layers", "num_encoder_layers"),
    "decoder": ("decoder_layers", "decoder_num_hidden_layers", "num_decoder_layers"),
}


def say_depth(look: ModelView, stack: str, owner: nn.Module, before: int, kept: list[int]) -> None:
    """Renumber the layers that are left, and set the counts and the lists by layer of every config
    that speaks of this stack. `owner`: the module that holds the list; `before`: how many layers
    there were; `kept`: which of them are left."""
    layers = {id(layer.module): layer for layer in look.layers if layer.stack == stack}
    for new, old in enumerate(kept):
        module = next(one.module for one in layers.values() if one.index == old)
        for part in module.modules():
            for name in _NUMBERS:
                if getattr(part, name, None) == old:
                    setattr(part, name, new)
    for name in _COUNTS:
        if getattr(owner, name, None) == before:
            setattr(owner, name, len(kept))
    sides = len(look.stacks) > 1 and getattr(
        getattr(look.model, "config", None), "is_encoder_decoder", False
    )
    mine = next((m.config for m in _upwards(look, owner) if hasattr(m, "config")), None)
    for config in configs(look.model) or [mine]:
        if config is None:
            continue
        names = _names(config, stack, bool(sides), config is mine, mine is look.model.config)
        if any(getattr(config, name, None) == before for name in names):
            _mend(config, names, before, kept)


def _names(config: Any, stack: str, sides: bool, mine: bool, shared: bool) -> tuple[str, ...]:
    """The attributes of a config that count the layers of this stack."""
    if not sides:
        return ("num_hidden_layers",) if mine else ()
    names = _OF_A_SIDE.get(stack, ())
    if mine and not shared:  # a config of this stack alone (T5 makes one for each)
        return (*names, "num_hidden_layers")
    if stack == "encoder" and hasattr(config, "num_decoder_layers"):
        return (*names, "num_layers")
    return names


def _mend(config: Any, names: tuple[str, ...], before: int, kept: list[int]) -> None:
    own = config.__dict__
    for name, value in list(own.items()):
        if isinstance(value, list | tuple) and len(value) == before and "layer" in name:
            own[name] = type(value)(value[old] for old in kept)
    stages = own.get("stage_names")
    if isinstance(stages, list) and len(stages) == before + 1:  # the embedding is one more
        own["stage_names"] = stages[: len(kept) + 1]
        own["_out_features"], own["_out_indices"] = [stages[len(kept)]], [len(kept)]
    for name in names:
        if getattr(config, name, None) == before:
            own[config.attribute_map.get(name, name)] = len(kept)


def _upwards(look: ModelView, module: nn.Module) -> list[Any]:
    """The module and everything around it, from the inside."""
    paths = {id(m): name for name, m in look.model.named_modules()}
    path, found = paths[id(module)], []
    while True:
        found.append(look.model.get_submodule(path))
        if not path:
            return found
        path = path.rpartition(".")[0]
