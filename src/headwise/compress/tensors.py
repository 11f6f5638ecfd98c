"""A model's tensors by name, in a file and back into a model that has none yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headwise.models.errors import UnsupportedModelError


def saved_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a checkpoint holds, the buffers that it leaves out), each tensor once, under the first
    of its names."""
    kept: dict[str, Tensor] = {}
    left_out: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor, persistent in _slots(model):
        if id(tensor) not in known:
            known.add(id(tensor))
            (kept if persistent else left_out)[name] = tensor.detach()
    return kept, left_out


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Raises UnsupportedModelError for tensors that hold no numbers of their own (device "meta",
    or packed in a class of another library)."""
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            what = "on device 'meta'" if tensor.device.type == "meta" else type(tensor).__name__
            raise UnsupportedModelError(f"{name} is {what} and cannot be written to a file")
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})


def read_tensors(file: Path, device: torch.device) -> dict[str, Tensor]:
    """Raises ValueError for a file that is damaged."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as held:
            return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of the model's own, in every place where one of these stands.

    Dtype and device come from what is given. Raises ValueError that names what is missing, what
    there is no place for, and what has another shape, before anything is changed.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in places:
                    first[f"{path}.{name}" if path else name] = tensor
                places.setdefault(id(tensor), []).append((module, name))
    missing, extra = sorted(first.keys() - tensors.keys()), sorted(tensors.keys() - first.keys())
    if missing or extra:
        raise ValueError(
            "the weights do not fit the model"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; there is no place for: {', '.join(extra)}" if extra else "")
        )
    for name, mine in first.items():
        if mine.shape != tensors[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(mine.shape)} in "
                "the model that its steps make"
            )
    for name, mine in first.items():
        new = tensors[name]
        if isinstance(mine, nn.Parameter):
            new = nn.Parameter(new, requires_grad=mine.requires_grad)
        for module, attribute in places[id(mine)]:
            if isinstance(new, nn.Parameter):
                module._parameters[attribute] = new
            else:
                module._buffers[attribute] = new


def without_numbers(model: nn.Module) -> list[str]:
    """Tensors that are neither parameters nor buffers, and hold nothing: nobody fills them."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.device.type == "meta"
    ]


def _slots(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether a checkpoint holds it) of every place, the same tensor again for
    each place that it stands in."""
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield dot + name, buffer, name not in module._non_persistent_buffers_set
