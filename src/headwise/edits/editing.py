"""The attentions that are edited now: registered with our attention function, and verified."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.edits.change import Change
from headwise.edits.groups import Changes, attend_changed
from headwise.models import built, conformance, interface
from headwise.models.errors import UnobservedError
from headwise.models.interface import Attended, Terms
from headwise.models.structure import AttentionView, ModelView
from headwise.parts import Attention

Layered = dict[int, dict[int, tuple[Change, ...]]]
"""place of an attention in its module's run -> head -> changes"""


class Edited:
    """One attention module with the changes of all swaps that are in force, in their order.

    A module that runs several times in a pass (ALBERT) has an AttentionView for each; which one a
    call belongs to is counted.
    """

    def __init__(self, view: ModelView, module: nn.Module) -> None:
        self.module = module
        self.views = [a for a in view.attentions if a.module is module]
        self.layers: list[tuple[object, Layered]] = []
        self.run, self.calls = -1, 0
        self.checked = False
        self.handles: list[Any] = []
        if isinstance(module, Attention):
            module.editor = built.edited
        self._attach(view.owners.get(self.views[0].stack, view.model))

    def add(self, owner: object, layered: Layered) -> None:
        self.layers.append((owner, layered))

    def remove(self, owner: object) -> None:
        self.layers = [entry for entry in self.layers if entry[0] is not owner]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        if isinstance(self.module, Attention):
            self.module.editor = None

    def changes(self) -> Changes:
        """Of the run that is going on: the changes of each head, outer swaps first."""
        place = self.run % len(self.views)
        found: dict[int, tuple[Change, ...]] = {}
        for _, layered in self.layers:
            for head, changes in layered.get(place, {}).items():
                found[head] = found.get(head, ()) + changes
        return found

    @property
    def view(self) -> AttentionView:
        return self.views[self.run % len(self.views)]

    def _attach(self, owner: nn.Module) -> None:
        """Count the runs of the module. Plain functions and not methods: a copy of the model takes
        its hooks with it, and a method would take a copy of this object."""

        def runs(module: nn.Module, args: Any) -> None:
            if module is self.module:
                self.run += 1
                self.calls = 0

        def ran(module: nn.Module, args: Any, output: Any) -> None:
            if module is self.module and self.calls != 1 and self.changes():
                raise UnobservedError(
                    f"{self.view.name} ({type(module).__name__}) is to be changed, but it called "
                    f"the attention interface {self.calls} times in one run instead of once, so "
                    "its heads are not what was asked for"
                )

        def begins(module: nn.Module, args: Any) -> None:
            if module is owner:
                self.run = -1

        self.handles.append(self.module.register_forward_pre_hook(runs))
        self.handles.append(self.module.register_forward_hook(ran))
        if len(self.views) > 1:
            self.handles.append(owner.register_forward_pre_hook(begins))

    # -- interface.Editor --------------------------------------------------------------------

    def active(self, module: nn.Module) -> bool:
        self.calls += 1
        return bool(self.changes())

    def check(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        given: dict[str, Any],
        before: str,
    ) -> None:
        if not self.checked:
            conformance.check(module, query, key, value, terms, given, before)
            self.checked = True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, whole: bool
    ) -> Attended:
        return attend_changed(self.view, self.changes(), query, key, value, terms, whole)


def attach(view: ModelView, owner: object, changes: dict[AttentionView, Changes]) -> None:
    """Put the changes of `owner` in force; modules without changes are passed through."""
    for attention in view.attentions:
        key = id(attention.module)
        edited = interface.EDITORS.get(key)
        if edited is None:
            edited = interface.EDITORS[key] = Edited(view, attention.module)
        assert isinstance(edited, Edited)
        if not any(entry[0] is owner for entry in edited.layers):
            places = [a for a in view.attentions if a.module is attention.module]
            edited.add(owner, {n: changes[a] for n, a in enumerate(places) if a in changes})


def detach(view: ModelView, owner: object) -> None:
    """Take them out again; whatever else is in force stays."""
    for attention in view.attentions:
        key = id(attention.module)
        edited = interface.EDITORS.get(key)
        if isinstance(edited, Edited):
            edited.remove(owner)
            if not edited.layers:
                edited.close()
                del interface.EDITORS[key]
