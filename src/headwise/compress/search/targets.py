"""What a user asks of a smaller model: how much is kept, and what it may cost in quality."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

KEEP = {
    "params": "parameters",
    "time": "seconds of a forward pass",
    "kv": "bytes of the key-value cache",
}
"""What can be asked to shrink."""

QUALITY = ("loss", "agreement", "kl")
"""What can be asked to hold."""


class UnreachableError(ValueError):
    """A budget that no model can meet that is made out of this one in the ways that are allowed.

    `reachable`: the smallest share of the original that can be kept.
    """

    def __init__(self, message: str, reachable: float) -> None:
        super().__init__(message)
        self.reachable = reachable


@dataclass(frozen=True)
class Keep:
    """The share of `what` (a key of `KEEP`) that may be left: 0.7 of the parameters."""

    what: str
    share: float

    def __post_init__(self) -> None:
        if self.what not in KEEP:
            raise ValueError(f"keep {self.what!r}: expected one of {', '.join(KEEP)}")
        if not 0 < self.share <= 1:
            raise ValueError(
                f"keep {self.what}={self.share}: expected a share of the original, above 0 and at "
                "most 1, such as 0.7"
            )

    def __str__(self) -> str:
        return f"{self.what}={self.share:g}"

    @staticmethod
    def read(given: Keep | str | Mapping[str, float]) -> Keep:
        """From "params=0.7", {"params": 0.7}, or as it is. Raises ValueError."""
        if isinstance(given, Keep):
            return given
        if isinstance(given, Mapping):
            if len(given) != 1:
                raise ValueError(
                    f"keep={dict(given)}: expected one budget; shrink the result again for a second"
                )
            ((name, left),) = given.items()
            return Keep(name, float(left))
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d*\.?\d+)\s*", given)
        if not match:
            raise ValueError(
                f"{given!r} is no budget; expected such as params=0.7, time=0.6 or kv=0.25"
            )
        return Keep(match[1], float(match[2]))


@dataclass(frozen=True)
class Limit:
    """A bound on quality: the loss may rise by `bound` nats (`change`) or to it; agreement of the
    next token with the original model may fall to it; KL may rise to it."""

    what: str
    bound: float
    change: bool = False

    def __str__(self) -> str:
        sign = ">=" if self.what == "agreement" else "<="
        return f"{self.what}{sign}{self.bound:{'+' if self.change else ''}g}"

    def holds(self, loss: float, loss_change: float, agreement: float, kl: float) -> bool:
        """Whether these figures are within the bound; a figure that is not known is not."""
        if self.what == "agreement":
            return agreement >= self.bound
        found = kl if self.what == "kl" else loss_change if self.change else loss
        return math.isfinite(found) and found <= self.bound

    @staticmethod
    def read(given: Limit | str) -> Limit:
        """From "loss<=+0.05" (a rise), "loss<=2.1", "agreement>=0.9" or "kl<=0.1". Raises
        ValueError."""
        if isinstance(given, Limit):
            return given
        number = r"(\d*\.?\d+(?:e[+-]?\d+)?)"  # also as a small bound is written: 1e-05
        match = re.fullmatch(rf"\s*(\w+)\s*(<=|>=)\s*(\+?)\s*{number}\s*", given)
        fits = match and match[1] in QUALITY and (match[2] == ">=") == (match[1] == "agreement")
        if not match or not fits or (match[3] and match[1] != "loss"):
            raise ValueError(
                f"{given!r} is no bound on quality; expected such as loss<=+0.05 (a rise by 0.05 "
                "nats), loss<=2.1, agreement>=0.9 or kl<=0.1"
            )
        return Limit(match[1], float(match[4]), bool(match[3]))
