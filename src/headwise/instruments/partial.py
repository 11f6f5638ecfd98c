"""Finished samples on disk, so that an interrupted run goes on where it was.

    out/partial/run.json            what is being measured: model, instruments, settings, inputs
    out/partial/<key>.safetensors   the numbers of one sample, in the format of an atlas

A key is a hash of the run and of the sample's own inputs. Files appear whole or not at all.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headwise.instruments.atlas_file import AtlasFileError, read_file, write_file
from headwise.instruments.atomic import write_atomically

__all__ = ["FOLDER", "Partial", "Result", "ResumeError"]

FOLDER = "partial"
_RUN = "run.json"


class ResumeError(ValueError):
    """The folder holds finished samples of another run."""


@dataclass
class Result:
    """The numbers of one sample: tables as in the Atlas, pairs, tiles, and the seconds it took."""

    heads: dict[str, np.ndarray]
    layers: dict[str, np.ndarray]
    pairs: dict[str, np.ndarray] = field(default_factory=dict)
    tiles: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Partial:
    """The folder of finished samples under `out`; without `out`, nothing is kept.

    identity: what makes the run this run, JSON-able. Without resume, what an earlier run left is
    removed. Raises ResumeError if it is to be resumed and was another run.
    """

    def __init__(
        self, out: str | os.PathLike[str] | None, identity: dict[str, Any], resume: bool
    ) -> None:
        self.folder = None if out is None else Path(out) / FOLDER
        self._said = said = json.dumps(identity, sort_keys=True)
        self._run = hashlib.sha256(said.encode()).hexdigest()
        if self.folder is None:
            return
        note = self.folder / _RUN
        if resume and note.is_file():
            _check(self.folder, json.loads(note.read_text(encoding="utf-8")), json.loads(said))
        else:
            self.remove()

    def _path(self, stimulus: str, digest: str) -> Path:
        assert self.folder is not None
        key = hashlib.sha256(f"{self._run} {stimulus} {digest}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.safetensors"

    def load(self, stimulus: str, digest: str) -> Result | None:
        """A sample that was finished before, or None."""
        if self.folder is None:
            return None
        path = self._path(stimulus, digest)
        if not path.is_file():
            return None
        try:
            found = read_file(path)
        except AtlasFileError:  # damaged: measured again
            return None
        seconds = float(found["provenance"]["seconds"])
        return Result(found["heads"], found["layers"], found["pairs"], found["tiles"], seconds)

    def save(self, stimulus: str, digest: str, result: Result) -> None:
        """Keep a finished sample. The folder is made for the first one: a run that finished
        nothing leaves nothing."""
        if self.folder is None:
            return
        note = self.folder / _RUN
        if not note.is_file():
            write_atomically(note, self._said.encode())
        content: dict[str, Any] = {
            "heads": result.heads,
            "layers": result.layers,
            "pairs": result.pairs,
            "spread": {},
            "tiles": result.tiles,
            "columns": [],
            "reasons": [],
            "provenance": {"seconds": result.seconds},
        }
        write_file(self._path(stimulus, digest), content)

    def remove(self) -> None:
        """Take the folder away: its numbers are in the atlas now, or are not wanted."""
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)


def _check(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    if was == now:
        return
    parts = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    told = "; ".join(f"{key} {_short(was.get(key))}, now {_short(now.get(key))}" for key in parts)
    raise ResumeError(
        f"{folder} holds samples of another run, which cannot be continued: {told}. Run it as it "
        "was, or start anew in another folder or without resume"
    )


def _short(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 80 else said[:77] + "..."
