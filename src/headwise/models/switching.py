"""The models whose attention is ours for a while, and what they had before.

Observing, editing and caches of our own need it, inside each other and in any order: each holds the
switch for itself, and the last one to let go sets every config back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from headwise.models import interface
from headwise.models.errors import UnsupportedModelError
from headwise.models.implementation import HELD, Held, config_of, configs
from headwise.models.structure import AttentionView


def hold(
    model: nn.Module, attentions: Iterable[AttentionView], cache: bool = False
) -> Callable[[], None]:
    """Give the model our attention; returns what lets go of it again. `cache`: for a cache, so that
    attentions that nobody observes or edits are as they were.

    Raises UnsupportedModelError, with everything as it was, where one of `attentions` did not
    take it.
    """
    mine = configs(model)
    if mine:  # a model of parts alone needs no transformers
        interface.register()
    for config in mine:
        if config._attn_implementation == interface.NAME and id(config) not in HELD:
            raise UnsupportedModelError(
                f"{type(model).__name__} has the attention {interface.NAME!r} already, though "
                "nothing observes or edits it (a copy of a model that is observed?): call "
                "model.set_attn_implementation('sdpa') first"
            )
    for config in mine:
        held = HELD.setdefault(id(config), Held(config, config._attn_implementation))
        held.holders += 1
        held.caches += cache
    released = False

    def release() -> None:
        nonlocal released
        if released:
            return
        released = True
        for config in mine:
            held = HELD[id(config)]
            held.holders -= 1
            held.caches -= cache
            if not held.holders:
                del HELD[id(config)]
                # the attribute behind the property: the property would set sub-configs as well
                config._attn_implementation_internal = held.before

    try:
        for part in _outermost(model):
            part.set_attn_implementation(interface.NAME)
        for attention in attentions:
            config = config_of(attention.module)
            if config is not None and config._attn_implementation != interface.NAME:
                raise UnsupportedModelError(
                    f"{type(model).__name__} did not take an attention implementation for "
                    f"{attention.name} ({type(attention.module).__name__}): its config still says "
                    f"{config._attn_implementation!r}"
                )
    except BaseException:
        release()
        raise
    return release


def _outermost(model: nn.Module) -> list[Any]:
    """The transformers models in `model` that are not inside another one."""
    if hasattr(model, "set_attn_implementation"):
        return [model]
    return [part for child in model.children() for part in _outermost(child)]
