"""A file is there whole, or as it was before: never half written."""

import os
import secrets
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to disk, and put it there in one step.

    Folders that are missing are made. Raises OSError as writing does; what stood at `path` is
    then as it was, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # opened by hand and not by tempfile, so that the file gets the user's usual permissions
    waiting = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    handle = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(waiting, path)
    except BaseException:
        waiting.unlink(missing_ok=True)
        raise
