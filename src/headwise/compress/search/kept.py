"""What a search has on disk: after every round the curve and the model, so that nothing is lost.

curve.json      every point so far, and which round's model stands beside it
round-007/      that model, until the search is done
model/          the result
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from headwise.compress.saving import load, save
from headwise.compress.search.curve import Curve

CURVE = "curve.json"
MODEL = "model"


class Kept:
    """The folder of a search, or nothing where `out` is None.

    asked: what was asked for; an interrupted search goes on only with the same. Raises ValueError
    for a folder with a search that is not to be resumed, or another one.
    """

    def __init__(
        self, out: str | os.PathLike[str] | None, asked: dict[str, Any], resume: bool
    ) -> None:
        self.folder = None if out is None else Path(out).expanduser()
        self.asked = asked
        self._curve: Curve | None = None
        if self.folder is None:
            if resume:
                raise ValueError("resume=True needs out=, the folder of the interrupted search")
            return
        path = self.folder / CURVE
        if not path.exists():
            return
        if not resume:
            raise ValueError(
                f"{path} is there already: go on with resume=True, or choose another folder"
            )
        self._curve = Curve.load(path)
        known = self._curve.about.get("asked", {})
        other = sorted(key for key in asked if known.get(key) != asked[key])
        if other:
            raise ValueError(
                f"{path} is of another search (it differs in {', '.join(other)}): choose another "
                "folder, or ask for the same"
            )

    def curve(self) -> Curve | None:
        """Of the interrupted search, if there is one."""
        return self._curve

    def model(self, original: nn.Module) -> nn.Module:
        """The model that goes with that curve."""
        if self.folder is None or self._curve is None:
            raise ValueError("there is no interrupted search")
        where = self.folder / str(self._curve.about["stands_in"])
        if not where.exists():  # it was renamed, and the curve not yet written
            where = self.folder / MODEL
        return load(where, into=copy.deepcopy(original))

    def write(
        self, curve: Curve, model: nn.Module, tokenizer: Any | None = None, point: int = 0
    ) -> None:
        """The model first, then the curve that names it, then the model before goes. point: that
        of which the model is; it is written once."""
        curve.about["asked"] = self.asked
        if self.folder is None:
            return
        before = curve.about.get("stands_in")
        name = f"round-{point:03}"
        if name != before:
            save(model, self.folder / name, tokenizer=tokenizer, overwrite=True)
        curve.about["stands_in"] = name
        curve.save(self.folder / CURVE)
        if before not in (None, name, MODEL):
            shutil.rmtree(self.folder / str(before), ignore_errors=True)

    def finish(self, curve: Curve) -> None:
        """The result in its own place."""
        if self.folder is None or curve.about["stands_in"] == MODEL:
            return
        stands, place = self.folder / str(curve.about["stands_in"]), self.folder / MODEL
        if stands.exists():
            if place.exists():
                shutil.rmtree(place)
            stands.rename(place)
        curve.about["stands_in"] = MODEL
        curve.save(self.folder / CURVE)
