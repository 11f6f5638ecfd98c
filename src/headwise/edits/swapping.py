"""`swap`: change what chosen heads compute, for a while, and know what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import nn

from headwise.edits.change import Change
from headwise.edits.changes import AddBias, Choose, UsePattern
from headwise.edits.editing import attach, detach
from headwise.edits.rotary import ScalePositions, frequencies_of, stretch, unstretch
from headwise.edits.selectors import Head, names_of, select
from headwise.maps import Bias, Pattern
from headwise.models.discovery import view as view_of
from headwise.models.errors import UnsupportedModelError
from headwise.models.structure import AttentionView, ModelView
from headwise.models.switching import hold

Selected = Mapping[Any, Any] | Iterable[tuple[Any, Any]]

_ACTIVE: list[Swap] = []


def swap(model: nn.Module | ModelView, changes: Selected | None = None) -> Swap:
    """Change what heads compute while this lasts, in prefill and in decoding.

        with headwise.swap(model, {atlas.where("kind == 'local'"): Window(64)}) as record:
            model.generate(**inputs)

        applied = headwise.swap(model, {(3, 1): Silence()}).apply()
        applied.undo()

    model: a Hugging Face model as it comes, or its view. changes: selector -> change, or pairs of
    them. For selectors see `headwise.edits.selectors`. A change is a `Change`, a pattern of
    `headwise.maps` (what the heads may still see), a bias by position such as `maps.Alibi`, a
    choice of `headwise.parts` (`choice(q, k, pattern, scale) -> Pattern`), a string such as
    "window(64)" (see `headwise.edits.notation`), or several of these in a list, in their order.
    `ScalePositions` goes with a whole stack.

    Swaps may be nested, in each other and in `observe`: an inner one changes what the outer one
    left, and what is observed is the changed attention. Attentions without changes compute what
    they computed before, to the bit; heads beside changed ones do to rounding (about 1e-6). The
    model is as it was when the block ends, also after an exception. A cache that was filled
    before, or is used after, holds the other model's keys.

    Raises ValueError for selectors that name nothing that is there, for two entries that name the
    same head, and for changes that cannot be done there, UnsupportedModelError for attentions
    that do not call transformers' attention interface; all of it before anything is changed.
    """
    look = model if isinstance(model, ModelView) else view_of(model)
    return Swap(look, changes if changes is not None else {})


class Record(list[dict[str, Any]]):
    """What a swap changes: for each entry {"change": str, "heads": [names]}, JSON-able."""

    def __repr__(self) -> str:
        if not self:
            return "nothing is changed"
        return "\n".join(f"{', '.join(entry['heads'])}: {entry['change']}" for entry in self)


class Swap:
    """Changes of one model, checked and ready. A context manager, or `apply()` and `undo()`."""

    def __init__(self, view: ModelView, changes: Selected) -> None:
        self.view = view
        self.record = Record()
        self._changes: dict[AttentionView, dict[int, tuple[Change, ...]]] = {}
        self._positions: list[tuple[list[tuple[nn.Module, str]], ScalePositions]] = []
        self._undo: list[Callable[[], None]] = []
        taken: dict[Head | str, Any] = {}
        pairs = changes.items() if isinstance(changes, Mapping) else changes
        for selector, change in pairs:
            heads = select(view, selector)
            if not heads:
                continue
            made = as_changes(change)
            if isinstance(made, ScalePositions):
                self._stretch(selector, heads, made, taken)
            else:
                self._change(selector, heads, made, taken)

    def _change(
        self,
        selector: Any,
        heads: list[Head],
        changes: tuple[Change, ...],
        taken: dict[Head | str, Any],
    ) -> None:
        by_attention: dict[AttentionView, list[int]] = {}
        for attention, head in heads:
            if (attention, head) in taken:
                name = names_of(self.view, [(attention, head)])[0]
                raise ValueError(
                    f"both {taken[attention, head]!r} and {selector!r} change {name}: which comes "
                    "first is not said; give one of them a list of changes, or nest two swaps"
                )
            taken[attention, head] = selector
            by_attention.setdefault(attention, []).append(head)
        for attention, own in by_attention.items():
            if attention.observable is not None:
                raise UnsupportedModelError(
                    f"{attention.name} cannot be changed: {attention.observable}"
                )
            for change in changes:
                change.check(attention, tuple(own))
            into = self._changes.setdefault(attention, {})
            into.update(dict.fromkeys(own, changes))
        names = names_of(self.view, heads)
        self.record += [{"change": repr(change), "heads": names} for change in changes]

    def _stretch(
        self,
        selector: Any,
        heads: list[Head],
        change: ScalePositions,
        taken: dict[Head | str, Any],
    ) -> None:
        own = [(a, h) for a in self.view.attentions if a.kind == "self" for h in range(a.heads)]
        chosen = set(heads)
        stacks = tuple(dict.fromkeys(a.stack for a, _ in heads))
        if any((a, h) not in chosen for a, h in own if a.stack in stacks):
            raise ValueError(
                f"{change!r} cannot be given to {selector!r}: positions are turned once for all "
                f"heads, before the attention is called; select a whole stack "
                f"({', '.join(self.view.stacks)}) or all"
            )
        for stack in stacks:
            if stack in taken:
                raise ValueError(f"both {taken[stack]!r} and {selector!r} scale the {stack}")
            taken[stack] = selector
        places = frequencies_of(self.view, stacks)
        for module, name in places:
            change.apply(getattr(module, name))
        self._positions.append((places, change))
        self.record.append({"change": repr(change), "heads": list(stacks)})

    @property
    def applied(self) -> bool:
        """Whether the changes are in force."""
        return self in _ACTIVE

    def apply(self) -> Swap:
        """Put the changes in force, until `undo`. Raises RuntimeError if they are already."""
        if self.applied:
            raise RuntimeError("this swap is in force already; undo() it first")
        try:
            if self._changes:
                attentions = [a for a in self.view.attentions if a in self._changes]
                self._undo.append(hold(self.view.model, attentions))
                self._undo.append(lambda: detach(self.view, self))
                attach(self.view, self, dict(self._changes))
            for places, change in self._positions:
                self._undo.append(_unstretching(places, change))
                stretch(places, change)
        except BaseException:
            self.undo()
            raise
        _ACTIVE.append(self)
        return self

    def undo(self) -> None:
        """Take the changes back; swaps that were applied since stay. May be called twice."""
        if self in _ACTIVE:
            _ACTIVE.remove(self)
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Record:
        self.apply()
        return self.record

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "in force" if self.applied else "not applied"
        return f"Swap of {type(self.view.model).__name__}, {state}\n{self.record!r}"


def _unstretching(
    places: list[tuple[nn.Module, str]], change: ScalePositions
) -> Callable[[], None]:
    return lambda: unstretch(places, change)


def active(model: nn.Module) -> list[dict[str, Any]]:
    """The records of all swaps that are in force in `model` now, outer ones first."""
    inside = {id(module) for module in model.modules()}
    mine = [s for s in _ACTIVE if any(id(a.module) in inside for a in s.view.attentions)]
    found: list[dict[str, Any]] = json.loads(json.dumps([e for s in mine for e in s.record]))
    return found


def as_changes(given: Any) -> tuple[Change, ...] | ScalePositions:
    """What a user gives as a change, as changes in their order.

    Raises TypeError for what is none, ValueError for positions among other changes.
    """
    if isinstance(given, str):
        from headwise.edits.notation import read_changes

        given = read_changes(given)
    if isinstance(given, ScalePositions):
        return given
    if isinstance(given, list | tuple):
        made = [as_changes(one) for one in given]
        if len(made) == 1:
            return made[0]
        parts: list[Change] = []
        for one in made:
            if isinstance(one, ScalePositions):
                raise ValueError(f"{one!r} cannot stand in a list; give it its own entry, or swap")
            parts += one
        if not parts:
            raise ValueError("an empty list of changes; leave the entry out")
        return tuple(parts)
    if isinstance(given, Change):
        return (given,)
    if isinstance(given, Pattern):
        return (UsePattern(given),)
    if isinstance(given, Bias) and not isinstance(given, type):
        return (AddBias(given),)
    if callable(given) and not isinstance(given, type):
        return (Choose(given),)
    said = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
    raise TypeError(
        f"{said} is no change; expected a Change, a pattern, a bias with tile(i, j), a choice "
        "(q, k, pattern, scale) -> Pattern, a string, or a list of these"
    )
