"""A change of a model's structure that can be written down and done again.

A smaller model is the original's config and a list of steps. `take` does a step and remembers it
on the model; `headwise.save` writes the list beside the weights; `headwise.load` builds the
original without weights, does the steps again, and then fills in the weights. So a step has to
work on a model that holds no data (device "meta"), and must not look at what the weights say:
which heads go, which rank a matrix gets, is decided before and said in the step.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any

from torch import nn

STEPS: dict[str, str] = {
    "prune_heads": "headwise.compress.structure.heads.PruneHeads",
    "prune_channels": "headwise.compress.structure.channels.PruneChannels",
    "reduce_tokens": "headwise.compress.tokens.reducing.ReduceTokens",
    "drop_layers": "headwise.compress.structure.layers.DropLayers",
    "replace_heads": "headwise.compress.structure.recurrent_heads.ReplaceHeads",
    "route_attention": "headwise.compress.structure.layer_routers.RouteAttention",
    "share_attention": "headwise.compress.structure.shared_maps.ShareAttention",
    "factorise": "headwise.compress.structure.low_rank.Factorise",
    "quantise": "headwise.compress.bits.weights.Quantise",
    "add_bias": "headwise.compress.structure.biases.AddBias",
    "threshold_activations": "headwise.compress.bits.thresholds.ThresholdActivations",
    "bit_linears": "headwise.compress.bits.ternary.BitLinears",
    "pack_bits": "headwise.compress.bits.packed.PackBits",
    "share_layers": "headwise.compress.structure.sharing.ShareLayers",
    "reorder_layers": "headwise.compress.structure.reordering.ReorderLayers",
    "mixture_to_dense": "headwise.compress.structure.mixtures.MixtureToDense",
}
"""Name of a step in a manifest -> the class that does it. Nothing else is ever imported."""

_REMEMBERED = "headwise_steps"
_BEFORE = "headwise_config_before"


class Step(ABC):
    """One change. Subclasses are frozen dataclasses of numbers, strings and tuples of them."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change the model in place, tensors and all that speaks of their sizes.

        Everything is checked before anything is changed. Raises ValueError for what this model
        does not have, UnsupportedModelError for a model whose parts were not found.
        """


def take(model: nn.Module, step: Step) -> None:
    """Do a step and remember it for `headwise.save`."""
    if _name(step) is None:
        raise ValueError(
            f"{type(step).__name__} is not in headwise.compress.step.STEPS, so that a model "
            "changed by it could not be loaded again: enter it there"
        )
    before = config_before(model)
    step.apply(model)
    setattr(model, _REMEMBERED, [*steps_of(model), step])
    setattr(model, _BEFORE, before)


def steps_of(model: nn.Module) -> tuple[Step, ...]:
    """What was done to this model, in order."""
    return tuple(getattr(model, _REMEMBERED, ()))


def config_before(model: nn.Module) -> dict[str, Any] | None:
    """The model's config as it was before the first step; None for a model without one."""
    if hasattr(model, _BEFORE):
        before: dict[str, Any] | None = getattr(model, _BEFORE)
        return before
    config: Any = getattr(model, "config", None)
    return copy.deepcopy(config.to_dict()) if hasattr(config, "to_dict") else None


def write_step(step: Step) -> dict[str, Any]:
    """The step as JSON takes it."""
    assert dataclasses.is_dataclass(step)
    fields = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    return {"step": _name(step), **fields}


def read_step(record: dict[str, Any]) -> Step:
    """A step from JSON. Raises ValueError for one that is not known."""
    name = record.get("step")
    place = STEPS.get(str(name))
    if place is None:
        raise ValueError(
            f"the step {name!r} is not known to this version of headwise; known are "
            f"{', '.join(sorted(STEPS))}"
        )
    module, _, cls = place.rpartition(".")
    fields = {key: _tuples(value) for key, value in record.items() if key != "step"}
    made = getattr(import_module(module), cls)(**fields)
    assert isinstance(made, Step)
    return made


def _name(step: Step) -> str | None:
    place = f"{type(step).__module__}.{type(step).__qualname__}"
    return next((name for name, known in STEPS.items() if known == place), None)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
