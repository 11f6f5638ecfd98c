"""Folders that are there whole, or as they were before."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_HERE = -100  # AT_FDCWD


@contextmanager
def written(path: Path, overwrite: bool) -> Iterator[Path]:
    """A new empty folder beside `path` that takes its place when the block ends without an error.

    Whatever happens, and whenever the process dies, `path` holds what it held or all of the new
    (where the system cannot exchange two folders at once, the old one stands beside it as
    `.NAME.*.old` for a moment). Raises FileExistsError for a folder that is there unless
    `overwrite`, before anything is written, and for what is there and no folder.
    """
    if path.exists() and (not overwrite or not path.is_dir()):
        raise FileExistsError(
            f"{path} is there already: give another place"
            + (", or overwrite=True" if path.is_dir() else "")
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    waiting.mkdir()
    try:
        yield waiting
        for file in waiting.rglob("*"):
            _flush(file)
        _flush(waiting)
        if path.exists():
            _take_over(waiting, path)
        else:
            waiting.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(waiting, ignore_errors=True)
        raise


def remains_of(path: Path) -> list[Path]:
    """What an interrupted exchange left of a folder that is not there now."""
    return [] if path.exists() else sorted(path.parent.glob(f".{path.name}.*.old"))


def _take_over(new: Path, path: Path) -> None:
    if _exchange(new, path):
        shutil.rmtree(new)
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(6)}.old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _posix() else None
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _posix() -> bool:
    return os.name == "posix"


def _flush(path: Path) -> None:
    if not _posix():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
