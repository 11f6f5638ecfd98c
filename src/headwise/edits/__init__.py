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
    from headwise.edits.directions import head_directions
    from headwise.edits.edit_effects import EditEffects, measure_edit
    from headwise.edits.effects import Effect, effect
    from headwise.edits.fact_prompts import Fact
    from headwise.edits.facts import edit_fact, edit_facts
    from headwise.edits.key_statistics import KeyStatistics, collect_key_statistics
    from headwise.edits.patch_file import Patch, patches_in
    from headwise.edits.registers import Neuron, Registers, find_register_neurons
    from headwise.edits.reweighing import CalibrateSinks, MoveMass, ScaleTokens
    from headwise.edits.rotary import ScalePositions
    from headwise.edits.swapping import Record, Swap, active, swap
    from headwise.edits.target_values import ValueSearch

_EXPORTS = {
    "AddBias": "headwise.edits.changes",
    "AddDirection": "headwise.edits.blending",
    "CalibrateSinks": "headwise.edits.reweighing",
    "Call": "headwise.edits.change",
    "Change": "headwise.edits.change",
    "Choose": "headwise.edits.changes",
    "Conversion": "headwise.edits.conversion",
    "EditEffects": "headwise.edits.edit_effects",
    "Effect": "headwise.edits.effects",
    "Fact": "headwise.edits.fact_prompts",
    "Full": "headwise.edits.deltas",
    "KeyStatistics": "headwise.edits.key_statistics",
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
    "ValueSearch": "headwise.edits.target_values",
    "active": "headwise.edits.swapping",
    "collect_key_statistics": "headwise.edits.key_statistics",
    "convert": "headwise.edits.conversion",
    "edit_fact": "headwise.edits.facts",
    "edit_facts": "headwise.edits.facts",
    "effect": "headwise.edits.effects",
    "find_register_neurons": "headwise.edits.registers",
    "head_directions": "headwise.edits.directions",
    "measure_edit": "headwise.edits.edit_effects",
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
    "EditEffects",
    "Effect",
    "Fact",
    "Full",
    "KeyStatistics",
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
    "ValueSearch",
    "active",
    "collect_key_statistics",
    "convert",
    "edit_fact",
    "edit_facts",
    "effect",
    "find_register_neurons",
    "head_directions",
    "measure_edit",
    "patches_in",
    "swap",
]


__getattr__, __dir__ = names_of(__name__, _EXPORTS)
