"""Clean and corrupted inputs side by side, and the positions that are asked for in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.instruments.examples import read_examples
from headwise.instruments.metrics import last_positions

__all__ = ["Pair", "Positions", "Spot", "read_pairs", "spots"]

Positions = str | Sequence[int] | Mapping[str, "int | Sequence[int] | Tensor"] | None
"""Which positions: "all", each on its own; "together", all at once; some, each on its own,
negative ones from the end of the real tokens; or named, with one number or one for each example.
"""


@dataclass(frozen=True, eq=False)
class Pair:
    """Some examples, clean and corrupted: `(batch, ...)` tensors of the same shapes."""

    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    rows: slice

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, eq=False)
class Spot:
    """A position with its label; `at` `(batch,)`, None for all positions at once."""

    label: str
    at: Tensor | None


def read_pairs(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    tokenizer: Any | None = None,
    batch_size: int = 16,
) -> Iterator[Pair]:
    """Each clean example with its corrupted one, in batches of equal length.

    Inputs are what `headwise.see` takes. Raises ValueError where their numbers differ, or the
    lengths of two that belong together: positions must mean the same in both.
    """
    first, second = (
        read_examples(model, given, tokenizer, windows=1, batch_size=1)
        for given in (clean, corrupted)
    )
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} clean and {len(second)} corrupted examples; expected one corrupted "
            "example for each clean one"
        )
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        _check(a.inputs, b.inputs, number)
    start = 0
    while start < len(first):
        stop = start + 1
        while stop < min(len(first), start + batch_size) and _alike(first[start], first[stop]):
            stop += 1
        yield Pair(_joined(first[start:stop]), _joined(second[start:stop]), slice(start, stop))
        start = stop


def spots(positions: Positions, inputs: Mapping[str, Tensor], n: int, rows: slice) -> list[Spot]:
    """The positions that are asked for, of these examples `rows`, among `n`.

    Raises ValueError for a position that is not there, or numbers for other examples.
    """
    batch = rows.stop - rows.start
    if positions == "together":
        return [Spot("all", None)]
    if positions == "all":
        return [Spot(str(at), torch.full((batch,), at)) for at in range(n)]
    if isinstance(positions, str) or positions is None:
        raise ValueError(
            f"positions={positions!r}: expected 'all', 'together', a list, or named positions"
        )
    if isinstance(positions, Mapping):
        named = {str(name): torch.as_tensor(given) for name, given in positions.items()}
    else:
        named = {str(at): torch.as_tensor(at) for at in positions}
    if not named:
        raise ValueError("no positions were given; 'all' are all of them, each on its own")
    last = last_positions(inputs, n, batch).cpu() if "attention_mask" in inputs else n - 1
    found = []
    for label, given in named.items():
        if given.dim() and len(given) < rows.stop:
            raise ValueError(
                f"positions {label!r} are given for {len(given)} examples, there are "
                f"{rows.stop} or more"
            )
        at = given[rows] if given.dim() else given.expand(batch)
        at = torch.where(at < 0, last + 1 + at, at)
        if bool(((at < 0) | (at >= n)).any()):
            raise ValueError(f"position {label} is outside of the {n} tokens of an example")
        found.append(Spot(label, at))
    return found


def _check(clean: Mapping[str, Tensor], corrupted: Mapping[str, Tensor], number: int) -> None:
    for key in sorted(clean.keys() | corrupted.keys()):
        shapes = [
            tuple(side[key].shape[1:]) if key in side else "none" for side in (clean, corrupted)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"example {number + 1}: {key} is {shapes[0]} clean and {shapes[1]} corrupted; "
                "expected equal lengths, so that a position is the same place in both (choose "
                "words of as many tokens)"
            )


def _alike(a: Any, b: Any) -> bool:
    return a.inputs.keys() == b.inputs.keys() and all(
        value.shape == b.inputs[key].shape for key, value in a.inputs.items()
    )


def _joined(examples: Sequence[Any]) -> dict[str, Tensor]:
    return {
        key: torch.cat([one.inputs[key] for one in examples]) if value.dim() else value
        for key, value in examples[0].inputs.items()
    }
