"""Whether transformers alone can build a model as it is now, from an ordinary config.

That is decided by trying: a model is built from the config that would say so, without weights, and
has to agree in every module, tensor shape and number that a module keeps.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from headwise.compress.structure.feeds import feed_forward
from headwise.models import UnsupportedModelError, view
from headwise.models.structure import ModelView

_CHANNELS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")
_HEADS = ("num_attention_heads", "num_heads")
_PLACES = (int, float, bool, str, tuple, type(None))
_SILENT = (
    *("training", "gradient_checkpointing", "p", "max_seq_len_cached"),
    *("num_heads", "num_key_value_heads", "kept"),
)
"""Attributes that may differ: they are for training, change while a model runs, are for views, or
count what the shapes say already. So are all with "drop" in their names."""

_ROOM = "headwise.compress."


def plain_config(model: nn.Module) -> tuple[Any | None, str]:
    """(the config that says what the model is, ""), or (None, why there is none)."""
    try:
        look = view(model)
    except UnsupportedModelError as error:
        return None, str(error)
    sizes, reason = _sizes(look)
    if reason:
        return None, reason
    config: Any = model.config
    for with_head_dim in (False, True):  # some read it without declaring it
        wanted = copy.deepcopy(config)
        try:
            for stack, size in sizes.items():
                _say(_part(wanted, look, stack), stack, size, with_head_dim, len(sizes) > 1)
            wanted = type(wanted).from_dict(wanted.to_dict())  # as it would come from a file
            wanted._attn_implementation = config._attn_implementation
            made = build(type(model), wanted)
        except Exception as error:  # whatever a config's or model's own check makes of the numbers
            said = " ".join(str(error).split())
            reason = f"{type(wanted).__name__} cannot say it ({type(error).__name__}: {said})"
            continue
        reason = difference(made, model)
        if not reason:
            wanted.architectures = [type(model).__name__]
            return wanted, ""
    return None, reason


def build(cls: type[Any], config: Any) -> nn.Module:
    """A model without weights (device "meta"), in evaluation mode."""
    with torch.device("meta"):
        made: nn.Module = cls(copy.deepcopy(config))
    return made.eval()


def difference(made: nn.Module, model: nn.Module) -> str:
    """The first thing in which two models are not built alike; "" where there is none."""
    mine, theirs = dict(model.named_modules()), dict(made.named_modules())
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in mine or name not in theirs:
            return f"{name} is there in one only"
        a, b = mine[name], theirs[name]
        if type(a) is not type(b):
            return f"{name} is a {type(a).__name__}, not a {type(b).__name__}"
        if _hooks(a) != _hooks(b):
            return f"{name} is run in another way"
        where = f"{name}." if name else ""
        shapes = [
            {n: tuple(t.shape) for n, t in {**m._parameters, **m._buffers}.items() if t is not None}
            for m in (a, b)
        ]
        for spare in a._non_persistent_buffers_set - shapes[1].keys():  # computed, and not used
            shapes[0].pop(spare, None)
        if shapes[0] != shapes[1]:
            which = next(n for n in {**shapes[0], **shapes[1]} if _differs(n, shapes))
            sizes = [s.get(which, "absent") for s in shapes]
            return f"{where}{which} is {sizes[0]}, and an ordinary config makes it {sizes[1]}"
        for key in sorted(vars(a).keys() & vars(b).keys()):
            one, other = vars(a)[key], vars(b)[key]
            if key.startswith("_") or key in _SILENT or "drop" in key or type(one) not in _PLACES:
                continue
            if one != other:
                return f"{where}{key} is {one}, and an ordinary config makes it {other}"
    mine_shared, their_shared = _shared(model), _shared(made)
    for some in sorted(map(sorted, mine_shared ^ their_shared)):
        one, many = "are one parameter", "several"
        if frozenset(some) in their_shared:
            one, many = "are several parameters", "one"
        return f"{', '.join(some[:2])} {one}, and an ordinary config makes {many}"
    return ""


def _shared(model: nn.Module) -> set[frozenset[str]]:
    """The names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(some) for some in names.values() if len(some) > 1}


def _hooks(module: nn.Module) -> list[str]:
    """The hooks that a step put there, not those of somebody who watches."""
    every = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    names = [getattr(hook, "__func__", hook) for hook in every]
    mine = [hook for hook in names if getattr(hook, "__module__", "").startswith(_ROOM)]
    return sorted(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in mine)


def _differs(name: str, shapes: list[dict[str, tuple[int, ...]]]) -> bool:
    return shapes[0].get(name) != shapes[1].get(name)


def _sizes(look: ModelView) -> tuple[dict[str, dict[str, int]], str]:
    """Heads, key-value heads, head_dim and channels of every stack, where all layers agree."""
    found: dict[str, dict[str, int]] = {}
    for stack in look.stacks:
        layers = [layer for layer in look.layers if layer.stack == stack]
        attentions = [a for a in look.attentions if a.stack == stack]
        several = {
            "heads": {a.heads for a in attentions},
            "kv_heads": {a.kv_heads for a in attentions},
            "head_dim": {a.head_dim for a in attentions},
        }
        channels = set()
        for layer in layers:
            try:
                channels.add(feed_forward(layer).channels)
            except UnsupportedModelError:  # experts, or nothing that can have been cut
                continue
        several["channels"] = channels
        for what, counts in several.items():
            if len(counts) > 1:
                listed = ", ".join(map(str, sorted(counts)))
                return {}, f"layers of the {stack} differ in {what} ({listed})"
        if any(not layer.attentions for layer in layers):
            return {}, f"some layers of the {stack} have no attention"
        found[stack] = {what: counts.pop() for what, counts in several.items() if counts}
    return found, ""


def _part(config: Any, look: ModelView, stack: str) -> Any:
    """The part of the config that speaks of a stack."""
    mine = getattr(look.owners[stack], "config", None)
    for name in getattr(config, "sub_configs", ()):
        if getattr(look.model.config, name, None) is mine is not None:
            return getattr(config, name)
    return config


def _say(config: Any, stack: str, size: dict[str, int], with_head_dim: bool, several: bool) -> None:
    sided = several and hasattr(config, f"{stack}_attention_heads")
    heads = (f"{stack}_attention_heads",) if sided else _HEADS
    channels = (f"{stack}_ffn_dim",) if sided else _CHANNELS
    values = [(heads, "heads"), (channels, "channels"), (("num_key_value_heads",), "kv_heads")]
    for names, what in values:
        name = next((n for n in names if hasattr(config, n)), None)
        if name is not None and what in size and getattr(config, name) != size[what]:
            # n_inner of GPT-2 is None as long as it is four times the width
            if getattr(config, name) is None and what == "channels":
                width = getattr(config, "hidden_size", 0)
                if size[what] == 4 * width:
                    continue
            setattr(config, name, size[what])
    if "head_dim" in size and (with_head_dim or getattr(config, "head_dim", None) is not None):
        config.head_dim = size["head_dim"]
