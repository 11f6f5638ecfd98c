"""A model that was made smaller, in a folder, and out of it again.

    config.json              as transformers writes it
    model.safetensors        the weights, where transformers alone can build the model
    headwise.safetensors     the weights, where it cannot: so nothing loads them into another model
    headwise_buffers.safetensors   what checkpoints leave out and a model computes when it is built
    headwise.json            format, class, original config, steps, hash of the weights, versions
    README.md                for people

Nothing of a folder is ever run: its class is looked up in transformers, its steps in
`headwise.compress.step.STEPS`, and weights are safetensors.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headwise.compress.folder import remains_of, written
from headwise.compress.plain import build, difference, plain_config
from headwise.compress.readme import readme
from headwise.compress.step import config_before, read_step, steps_of, take, write_step
from headwise.compress.tensors import (
    fill,
    read_tensors,
    saved_tensors,
    without_numbers,
    write_tensors,
)
from headwise.models.errors import UnsupportedModelError
from headwise.models.identity import weights_hash
from headwise.models.implementation import implementation
from headwise.models.interface import NAME

FORMAT = 1
MANIFEST = "headwise.json"
PLAIN = "model.safetensors"
OWN = "headwise.safetensors"
BUFFERS = "headwise_buffers.safetensors"


def save(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, and what was done to it, to a folder that `load` reads; returns the folder.

    Where all layers are alike in a way that the model's ordinary config can say, the folder is a
    Hugging Face checkpoint as well, which `from_pretrained` loads without headwise; README.md
    says which. tokenizer: saved with it. overwrite: put it in the place of a folder that is there;
    that one is whole until the new one is.

    Raises FileExistsError for a folder that is there, UnsupportedModelError for a model whose
    structure was changed by something else than the steps of this room, which could not be done
    again, and for tensors that no file can hold.
    """
    place = Path(path)
    kept, left_out = saved_tensors(model)
    config: Any = getattr(model, "config", None)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "class": class_name(model),
        "config": config_before(model),
        "attention": _attention(model),
        "steps": [write_step(step) for step in steps_of(model)],
        "versions": _versions(),
    }
    plain, reason = None, "the model is not one of transformers"
    if manifest["class"].startswith("transformers."):
        _check(model, manifest)
        plain, reason = plain_config(model)
    with written(place, overwrite) as folder:
        weights = folder / (OWN if plain is None else PLAIN)
        write_tensors(kept, weights)
        write_tensors(left_out, folder / BUFFERS)
        manifest["weights"] = {"file": weights.name, "hash": weights_hash(weights)}
        manifest["buffers"] = weights_hash(folder / BUFFERS)
        said = plain or config
        if hasattr(said, "to_json_string"):
            text = json.loads(said.to_json_string(use_diff=True))
            text["architectures"] = [type(model).__name__]
            (folder / "config.json").write_text(json.dumps(text, indent=2) + "\n", "utf-8")
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        written_manifest = json.dumps(manifest, indent=1)
        (folder / MANIFEST).write_text(written_manifest + "\n", "utf-8")
        (folder / "README.md").write_text(readme(manifest, reason), "utf-8")
    return place


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    into: nn.Module | None = None,
) -> nn.Module:
    """The model that `save` wrote, in evaluation mode: built without weights, its steps done
    again, its weights filled in, each in its dtype.

    dtype: what floating-point parameters are converted to. into: a model as it was before any
    step, built by the caller: needed for models that are not classes of transformers, and changed
    in place.

    Raises FileNotFoundError for a folder that is not there or none of `save`'s, ValueError for
    another format, damaged files, weights that do not fit (what is missing or too many is named)
    and an `into` that is another model.
    """
    place = Path(path)
    manifest = read_manifest(place)
    weights = place / str(manifest["weights"]["file"])
    if weights.name not in (PLAIN, OWN):
        raise ValueError(f"{place / MANIFEST} names {weights.name!r}, which no version wrote")
    said_of = {weights: manifest["weights"]["hash"], place / BUFFERS: manifest["buffers"]}
    for file, said in said_of.items():
        found = weights_hash(file)
        if found != said:
            raise ValueError(
                f"{file} is not what was saved: its hash is {found}, {MANIFEST} says {said}"
            )
    steps = [read_step(record) for record in manifest["steps"]]
    model = _empty(place, manifest) if into is None else _given(into, manifest)
    for step in steps:
        take(model, step)
    at = torch.device(device)
    fill(model, {**read_tensors(weights, at), **read_tensors(place / BUFFERS, at)})
    hollow = without_numbers(model)
    if hollow:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps {', '.join(hollow)} as plain attributes, which no file "
            "holds: build the model before its steps yourself and give it as into="
        )
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if (place / "generation_config.json").exists() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        generation: Any = GenerationConfig.from_pretrained(place)
        model.generation_config = generation
    return model.eval()


def read_manifest(place: Path) -> dict[str, Any]:
    """headwise.json of a folder. Raises as `load` does."""
    file = place / MANIFEST
    if not file.is_file():
        left = remains_of(place)
        hint = f"; {left[-1]} holds what stood there before it was replaced" if left else ""
        raise FileNotFoundError(f"{file} is not there: {place} was not written by save{hint}")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if version != FORMAT:
        raise ValueError(
            f"{file} has format {version}, this version of headwise reads {FORMAT}: update it"
        )
    return manifest


def class_name(model: nn.Module) -> str:
    """Module and name of a model's class; of a class of transformers "transformers.NAME"."""
    cls = type(model)
    if cls.__module__.startswith("transformers."):
        return f"transformers.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _empty(place: Path, manifest: dict[str, Any]) -> nn.Module:
    """The model before its steps, without weights."""
    import transformers

    room, _, name = str(manifest["class"]).rpartition(".")
    cls = getattr(transformers, name, None) if room == "transformers" else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"{place}: {manifest['class']} is no model class of transformers; build the model as "
            "it was before its steps and give it as into="
        )
    config = cls.config_class.from_dict(dict(manifest["config"]))  # type: ignore[union-attr]
    if manifest["attention"] is not None:
        config._attn_implementation = manifest["attention"]
    return build(cls, config)


def _given(model: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    if class_name(model) != manifest["class"]:
        raise ValueError(f"into= is a {class_name(model)}, the folder holds a {manifest['class']}")
    if steps_of(model):
        raise ValueError("into= has been changed already: give the model as it was before")
    return model


def _check(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Raise where the steps do not lead to the model as it is."""
    try:
        again = _empty(Path(), manifest)
        for step in steps_of(model):
            take(again, step)
    except (ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be built again from its config and steps: {error}"
        ) from error
    found = difference(again, model)
    if found:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not what its config and steps lead to: {found}; it was "
            "changed by something that is no Step (headwise.compress.take), and what is saved "
            "could not be loaded"
        )


def _attention(model: nn.Module) -> str | None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation"):
        return None
    named = implementation(model)
    return None if named == NAME else named


def _versions() -> dict[str, str]:
    import safetensors

    import headwise

    found = {
        "headwise": headwise.__version__,
        "torch": str(torch.__version__),
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
    try:
        import transformers
    except ImportError:
        return found
    return {**found, "transformers": transformers.__version__}
