"""The Atlas as one file: safetensors, numbers as tensors, everything else as JSON in its header.

Any safetensors reader, in any language, can read the file: tensors are named `heads/<column>`,
`layers/<column>`, `pairs/<name>`, `spread/<column>` and `tiles/<number>/<name>`; the header's
metadata has `format` = "headwise-atlas", `version`, and `atlas`, a JSON text with the columns of
names, their order and descriptions, reasons, tiles and provenance.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from headwise.instruments.atomic import write_atomically

__all__ = ["FILE_NAME", "FORMAT", "VERSION", "AtlasFileError", "read_file", "write_file"]

FORMAT = "headwise-atlas"
VERSION = 1
# the name of an atlas in a folder of results; `Atlas.load` finds it there
FILE_NAME = "atlas.safetensors"

_TABLES = ("heads", "layers", "pairs", "spread")


class AtlasFileError(ValueError):
    """The file is not an atlas, is damaged, or was written by a newer headwise."""


def write_file(path: str | os.PathLike[str], content: dict[str, Any]) -> Path:
    """Write the parts of an atlas to `path`, all of it or nothing; return the path.

    A reader sees the old file or the new one, never half of one: the bytes go to a temporary
    file in the same folder, reach the disk, and take the place of `path` in one step.
    Folders that do not exist are made.
    """
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    plain: dict[str, Any] = {"order": {}, "names": {}}
    for table in _TABLES:
        entries: dict[str, np.ndarray] = content[table]
        plain["order"][table] = list(entries)
        plain["names"][table] = {}
        for name, values in entries.items():
            if values.dtype.kind == "U":
                plain["names"][table][name] = values.tolist()
            else:
                tensors[f"{table}/{name}"] = _storable(values, f"{table}[{name!r}]")
    plain["tiles"] = []
    for number, tile in enumerate(content["tiles"]):
        rest = {}
        for name, value in tile.items():
            if isinstance(value, np.ndarray) and value.dtype.kind != "U":
                tensors[f"tiles/{number}/{name}"] = _storable(value, f"tiles[{number}][{name!r}]")
            else:
                rest[name] = _plain(value)
        plain["tiles"].append(rest)
    for name in ("columns", "reasons", "provenance"):
        plain[name] = _plain(content[name])
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "atlas": json.dumps(plain, allow_nan=False),
    }
    write_atomically(path, to_bytes(tensors, metadata=metadata))
    return path


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parts of the atlas in `path` (a file, or a folder that holds `atlas.safetensors`).

    Raises FileNotFoundError if there is nothing, AtlasFileError if it is no readable atlas.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no atlas at {path}: give the file that Atlas.save wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check(path, metadata)
            plain = json.loads(metadata["atlas"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AtlasFileError(_unreadable(path, error)) from error
    content: dict[str, Any] = {name: plain[name] for name in ("columns", "reasons", "provenance")}
    for table in _TABLES:
        names = plain["names"][table]
        content[table] = {
            name: np.array(names[name], dtype=str) if name in names else tensors[f"{table}/{name}"]
            for name in plain["order"][table]
        }
    content["tiles"] = plain["tiles"]
    for key, values in tensors.items():
        table, _, name = key.partition("/")
        if table == "tiles":
            number, _, name = name.partition("/")
            content["tiles"][int(number)][name] = values
    return content


def _check(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise AtlasFileError(
            f"{path} is a safetensors file but not an atlas (its header names no {FORMAT!r}); "
            "give a file that Atlas.save or `headwise see` wrote"
        )
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise AtlasFileError(
            f"{path} has atlas format version {version or 'none'}; this headwise reads up to "
            f"{VERSION}: update headwise to read it"
        )


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        return f"{path} is empty: it holds no atlas"
    if start[8:] == b"{":  # eight bytes of header length, then the header: it began as safetensors
        return f"{path} is truncated or damaged ({error}): write it again or take another copy"
    return f"{path} is not an atlas: it is not a safetensors file ({error})"


def _storable(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind not in "fiub":
        raise TypeError(
            f"{name} has dtype {values.dtype}; an atlas file holds numbers, truth values and text"
        )
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))


def _plain(value: Any) -> Any:
    """The value in JSON's own types; what JSON has no word for (NaN, infinity) becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)  # paths, dates, versions: for reading, not for computing
