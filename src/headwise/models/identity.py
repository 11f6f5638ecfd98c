"""What a model is called, and which weights it holds."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["config_of", "model_name", "weights_hash"]

_CHUNK = 1 << 24  # bytes that are hashed, and copied from a device, at a time


def weights_hash(
    source: nn.Module | str | os.PathLike[str], instead: Mapping[str, Tensor] | None = None
) -> str:
    """SHA-256 of a model's parameters, or of the safetensors files in a folder, as "sha256:...".

    Parameters go by name, with dtype and shape, those that several names share under the first
    name; files go by name and content. Both are read in pieces, so memory stays small. The two
    hashes of the same model differ, and so do those of the same model in another dtype.
    `instead`: by name, what some parameters shall be taken to hold.
    Raises FileNotFoundError for a folder without safetensors files, ValueError for a model whose
    parameters hold no data (device "meta").
    """
    digest = hashlib.sha256()
    if isinstance(source, nn.Module):
        for name, parameter in sorted(source.named_parameters()):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            for piece in _pieces(name, (instead or {}).get(name, parameter).detach()):
                digest.update(piece)
        return f"sha256:{digest.hexdigest()}"
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {path}: nothing to hash")
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(_CHUNK):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def model_name(model: nn.Module) -> str:
    """The name in the model's configuration; of a folder its last part; else the class's name."""
    name = str(getattr(config_of(model), "_name_or_path", "") or "")
    if not name:
        return type(model).__name__
    # hub names are "owner/name"; whatever is a place on this machine tells of its user
    is_place = os.path.isabs(name) or name.startswith((".", "~")) or os.path.exists(name)
    return (Path(name).name or type(model).__name__) if is_place else name


def _pieces(name: str, tensor: Tensor) -> Iterable[memoryview]:
    if tensor.device.type == "meta":
        raise ValueError(f"parameter {name} is on the meta device and holds no data to hash")
    rows = tensor.reshape(-1)  # a copy only where the tensor has gaps
    step = _CHUNK // max(1, tensor.element_size())
    for start in range(0, rows.numel(), step):
        piece = rows[start : start + step].cpu().contiguous()
        yield piece.view(torch.uint8).numpy().data


def config_of(model: nn.Module) -> Any:
    """The configuration of a model in transformers' form, or None."""
    return getattr(model, "config", None)
