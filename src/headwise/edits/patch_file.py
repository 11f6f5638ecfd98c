"""Edits that stay: what is added to a model's weights, with the record of why and what it does.

patch = edit_fact(model, "The Space Needle is in", "Space Needle", "Rome", ...)
patch.save("needle.safetensors")

with Patch.load("needle.safetensors", model):
    model.generate(**inputs)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from headwise.edits.deltas import Delta, added, read_delta
from headwise.edits.swapping import Swap, swap
from headwise.models.atomic import write_atomically
from headwise.models.identity import model_name, weights_hash
from headwise.models.structure import ModelView

FORMAT = 1
_KEY = "headwise_patch"  # of the record in the file's header
_MARK = "_headwise_patches"  # attribute of a model: its patches in force, in order


@dataclass(eq=False)
class _Held:
    """A parameter in force, and what it held before."""

    parameter: nn.Parameter
    before: Tensor
    delta: Delta

    def put(self) -> None:
        with torch.no_grad():
            self.before = self.parameter.detach().clone()
            self.parameter.copy_(added(self.before, self.delta))

    def restore(self) -> None:
        with torch.no_grad():
            self.parameter.copy_(self.before)


class Patch:
    """Changes of one model's weights, and of its attention, with their record.

    `deltas`: parameter name -> what is added. `changes`: selector -> change, both as text (see
    `headwise.edits.selectors` and `headwise.edits.notation`), applied by `headwise.swap` on top.
    `record`: JSON-able; `model` {"name", "class", "weights": hash} is filled in by `of`, the rest
    is the maker's: method, request, effects. `model`: the one that it changes, or None until `on`.

    `apply()` and `undo()`, or a context manager. Undoing puts back the very numbers that stood
    there, never a difference; patches that were applied after it stay, computed anew on what was
    restored. What training did in between to a patched tensor is lost by undoing. Weights that
    share one tensor (tied embeddings) change together.
    """

    def __init__(
        self,
        deltas: Mapping[str, Delta],
        record: Mapping[str, Any] | None = None,
        changes: Mapping[str, str] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.deltas = dict(deltas)
        self.record: dict[str, Any] = json.loads(json.dumps(dict(record or {}), allow_nan=False))
        self.changes = {str(selector): str(change) for selector, change in (changes or {}).items()}
        self.model = model
        self._held: list[_Held] = []
        self._swap: Swap | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module | ModelView,
        deltas: Mapping[str, Delta],
        record: Mapping[str, Any] | None = None,
        changes: Mapping[str, str] | None = None,
    ) -> Self:
        """A patch of this model as its weights stand now. Raises ValueError for names, shapes or
        changes that do not fit it."""
        inner = model.model if isinstance(model, ModelView) else model
        known = {
            "name": model_name(inner),
            "class": type(inner).__name__,
            "weights": weights_hash(inner),
        }
        patch = cls(deltas, {**(record or {}), "model": known}, changes, inner)
        patch._targets(inner)
        if patch.changes:
            swap(inner, patch.changes)  # raises for what cannot be done there
        return patch

    def on(self, model: nn.Module | ModelView) -> Self:
        """The same patch for this model. Raises ValueError, with both hashes, where its weights
        are not those that the patch was made for.

        They are where the patch was made: as the model stands, or without the patches in force
        (all, or the last ones), so that several patches of one model can be applied together.
        """
        inner = model.model if isinstance(model, ModelView) else model
        wanted = self.record.get("model", {}).get("weights")
        if wanted is not None:
            self._check(inner, wanted)
        patch = type(self)(self.deltas, self.record, self.changes, inner)
        patch._targets(inner)
        return patch

    def _check(self, model: nn.Module, wanted: str) -> None:
        found = weights_hash(model)
        if found == wanted:
            return
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        instead: dict[str, Tensor] = {}
        for patch in reversed(patches_in(model)):
            if patch._held:
                instead |= {names[id(held.parameter)]: held.before for held in patch._held}
                if weights_hash(model, instead) == wanted:
                    return
        made_for = self.record["model"]
        raise ValueError(
            f"this patch was made for {made_for.get('name')} with weights {wanted}; this is "
            f"{model_name(model)} with weights {found}: load the model that it was made for, in "
            "the same dtype, with the patches that it was made upon"
        )

    def _targets(self, model: nn.Module) -> list[tuple[nn.Parameter, Delta]]:
        """The parameters that change, each checked."""
        named = dict(model.named_parameters(remove_duplicate=False))
        seen: dict[int, str] = {}
        found = []
        for name, delta in self.deltas.items():
            parameter = named.get(name)
            if parameter is None:
                raise ValueError(f"the model has no parameter {name!r}, which the patch changes")
            if id(parameter) in seen:
                raise ValueError(
                    f"{seen[id(parameter)]} and {name} are one tensor; a patch changes it once"
                )
            if parameter.shape != delta.shape or not parameter.is_floating_point():
                raise ValueError(
                    f"{name} is {tuple(parameter.shape)} of {parameter.dtype}; the patch is made "
                    f"for floating-point numbers of shape {tuple(delta.shape)}"
                )
            seen[id(parameter)] = name
            found.append((parameter, delta))
        return found

    @property
    def applied(self) -> bool:
        """Whether the model carries it now."""
        return self.model is not None and any(p is self for p in patches_in(self.model))

    def apply(self) -> Self:
        """Put it in force, until `undo`. Raises RuntimeError if it is already, or belongs to no
        model yet."""
        if self.model is None:
            raise RuntimeError("this patch belongs to no model yet: patch.on(model).apply()")
        if self.applied:
            raise RuntimeError("this patch is in force already; undo() it first")
        targets = self._targets(self.model)
        made = swap(self.model, self.changes) if self.changes else None
        try:
            for parameter, delta in targets:
                held = _Held(parameter, parameter.detach(), delta)
                held.put()
                self._held.append(held)
            self._swap = made.apply() if made is not None else None
        except BaseException:
            self._restore()
            self._held = []
            raise
        self.model.__dict__.setdefault(_MARK, []).append(self)
        return self

    def undo(self) -> None:
        """Put back what stood there before, to the bit. May be called twice."""
        if not self.applied:
            return
        assert self.model is not None
        present: list[Patch] = self.model.__dict__[_MARK]
        at = next(i for i, patch in enumerate(present) if patch is self)
        later = present[at + 1 :]
        for patch in reversed(later):
            patch._restore()
        self._restore()
        for patch in later:
            for held in patch._held:
                held.put()
        if self._swap is not None:
            self._swap.undo()
            self._swap = None
        self._held = []
        present.pop(at)
        if not present:
            del self.model.__dict__[_MARK]

    def _restore(self) -> None:
        for held in reversed(self._held):
            held.restore()

    def __enter__(self) -> Self:
        return self.apply()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.undo()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a safetensors file, whole or not at all; the record stands in its header."""
        tensors = {
            f"{name}.{suffix}": tensor.detach().cpu().contiguous()
            for name, delta in self.deltas.items()
            for suffix, tensor in delta.tensors().items()
        }
        told = {"format": FORMAT, "record": self.record, "changes": self.changes}
        header = {_KEY: json.dumps(told, sort_keys=True)}
        write_atomically(Path(path), safetensors.torch.save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | ModelView | None = None) -> Self:
        """Read a file of `save`, for `model` where it is given (see `on`).

        Raises FileNotFoundError, and ValueError for files that hold no patch or one of a newer
        format, and for another model's weights.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no patch file {file}")
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                told = json.loads((opened.metadata() or {}).get(_KEY, "null"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is no patch file: {error}") from error
        if not isinstance(told, dict):
            raise ValueError(f"{file} is no patch file: its header has no {_KEY}")
        if told.get("format") != FORMAT:
            raise ValueError(
                f"{file} is of format {told.get('format')}; this headwise reads format {FORMAT}"
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, suffix = name.rpartition(".")
            parts.setdefault(parameter, {})[suffix] = tensor
        deltas = {name: read_delta(found) for name, found in parts.items()}
        patch = cls(deltas, told["record"], told["changes"])
        return patch if model is None else patch.on(model)

    def __repr__(self) -> str:
        said = self.record.get("method", "patch")
        state = "in force" if self.applied else "not applied"
        return f"Patch({said}; {', '.join([*self.deltas, *self.changes]) or 'empty'}; {state})"


def patches_in(model: nn.Module) -> list[Patch]:
    """The patches in force in a model, in the order in which they were applied."""
    return list(model.__dict__.get(_MARK, []))
