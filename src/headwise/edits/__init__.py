"""Change what a model computes, reversibly.

    with headwise.swap(model, {(3, 1): headwise.edits.Silence()}) as record:
        model(**inputs)

Loaded lazily: torch is not imported before it is needed.
"""

from typing import TYPE_CHECKING

from headwise.lazy import names_of

if TYPE_CHECKING:
    from headwise.edits.blending import AddDirection, TowardsSelf
    from headwise.edits.change import Call, Change
    from headwise.edits.changes import (
        AddBias,
        Choose,
        LogLength,
        Scale,
        ScaleSink,
        Silence,
        Temperature,
        Uniform,
        UsePattern,
    )
    from headwise.edits.conversion import Conversion, convert
    from headwise.edits.deltas import Full, LowRank
    from headwise.edits.effects import Effect, effect
    from headwise.edits.patch_file import Patch, patches_in
    from headwise.edits.registers import Neuron, Registers, find_register_neurons
    from headwise.edits.reweighing import CalibrateSinks, MoveMass, ScaleTokens
    from headwise.edits.rotary import ScalePositions
    from headwise.edits.swapping import Record, Swap, active, swap

_EXPORTS = {
    "AddBias": "headwise.edits.changes",
    "AddDirection": "headwise.edits.blending",
    "CalibrateSinks": "headwise.edits.reweighing",
    "Call": "headwise.edits.change",
    "Change": "headwise.edits.change",
    "Choose": "headwise.edits.changes",
    "Conversion": "headwise.edits.conversion",
    "Effect": "headwise.edits.effects",
    "Full": "headwise.edits.deltas",
    "LogLength": "headwise.edits.changes",
    "LowRank": "headwise.edits.deltas",
    "MoveMass": "headwise.edits.reweighing",
    "Neuron": "headwise.edits.registers",
    "Patch": "headwise.edits.patch_file",
    "Record": "headwise.edits.swapping",
    "Registers": "headwise.edits.registers",
    "Scale": "headwise.edits.changes",
    "ScalePositions": "headwise.edits.rotary",
    "ScaleSink": "headwise.edits.changes",
    "ScaleTokens": "headwise.edits.reweighing",
    "Silence": "headwise.edits.changes",
    "Swap": "headwise.edits.swapping",
    "Temperature": "headwise.edits.changes",
    "TowardsSelf": "headwise.edits.blending",
    "Uniform": "headwise.edits.changes",
    "UsePattern": "headwise.edits.changes",
    "active": "headwise.edits.swapping",
    "convert": "headwise.edits.conversion",
    "effect": "headwise.edits.effects",
    "find_register_neurons": "headwise.edits.registers",
    "patches_in": "headwise.edits.patch_file",
    "swap": "headwise.edits.swapping",
}

__all__ = [
    "AddBias",
    "AddDirection",
    "CalibrateSinks",
    "Call",
    "Change",
    "Choose",
    "Conversion",
    "Effect",
    "Full",
    "LogLength",
    "LowRank",
    "MoveMass",
    "Neuron",
    "Patch",
    "Record",
    "Registers",
    "Scale",
    "ScalePositions",
    "ScaleSink",
    "ScaleTokens",
    "Silence",
    "Swap",
    "Temperature",
    "TowardsSelf",
    "Uniform",
    "UsePattern",
    "active",
    "convert",
    "effect",
    "find_register_neurons",
    "patches_in",
    "swap",
]


__getattr__, __dir__ = names_of(__name__, _EXPORTS)
