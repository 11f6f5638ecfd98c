"""Writes docs/known-answers.md: what the instruments find in models whose circuit is known.

python -m recipes.known_answers
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch

from headwise.instruments import attribute, patch
from headwise.instruments.ablations import ablation
from headwise.instruments.circuit import find_circuit
from headwise.instruments.metrics import LogitDifference
from headwise.tasks import circuits
from headwise.tasks.circuits import KnownCircuit

PAGE = Path(__file__).resolve().parent.parent / "docs" / "known-answers.md"
PAIRS = 16

HEAD = """# Known answers

Written by `python -m recipes.known_answers`.

Whether an instrument is right can be seen where the truth is known. `headwise.tasks.circuits` holds
models whose weights were written down by hand, so that it is known which heads, feed-forward layers
and paths do the work. Beside those stand heads that do nothing, and look as if they did: sinks, the
loudest outputs, copies of the circuit's own heads whose output nobody reads. Each has a control
that solves the same task in another way, in which the circuit's heads look just alike and are idle.

    from headwise.instruments.circuit import find_circuit
    from headwise.instruments.metrics import LogitDifference
    from headwise.tasks import circuits

    known = circuits.induction()
    pair = known.contrast(16, 0)             # problems that differ where the circuit looks
    metric = LogitDifference(pair.right, pair.wrong, pair.at)
    found = find_circuit(known.model, pair.clean, pair.corrupted, metric, mlps="hold")
    set(found.heads) == known.heads          # True

## The circuits
"""
ROW = "| `{name}` | {heads} | {feeds} | {decoys} | {control} |"
COLUMNS = (
    "| circuit | heads | feed-forward | idle heads | heads of the control |\n"
    "| --- | --- | --- | --- | --- |"
)
FOUND = f"""
## What the instruments find

Over {PAIRS} pairs of problems. *Ablation* is the change of the logit difference without the head
(zero); *patching* what its clean output brings back of the answer in the corrupted run, run and not
estimated; the *estimates* take gradients instead. The heads that are not there have less than
0.01 everywhere. *Paths* are those that `find_circuit` gives, and how many of them are among the
known ones; paths along which both problems agree, such as queries that ask the same, cannot show.

| model | head | ablation | patching | gradient | integrated | paths |
| --- | --- | --- | --- | --- | --- | --- |"""
TAIL = """
A gradient does not pass a saturated softmax or a flat step. So the first-order estimate misses
the previous-token head, the inhibition and every head behind the staircase of addition; averaged
over inputs between the two runs it finds some of them. It names no head that is not in the circuit.

## What is not the cause

The share of problems in which the highest score is at the token that the answer is copied from:

| method | {names} |
| --- | {rule} |
{rows}

Rollout and flow multiply maps, and count the decoys' as well. Of the same kind: probes read the
token before off the previous-token head and off its decoy; composition of weights is as high with
the induction head's decoy as with itself; and a fact can be edited into the memory also where the
model keeps its facts elsewhere (Hase et al. 2023, arXiv 2301.04213). `tests/proof` holds all this.
"""
METHODS = (
    *("gradient_x_input", "integrated_gradients", "lrp", "generic"),
    *("raw_attention", "rollout", "flow", "random"),
)


def page() -> str:
    """The page, measured anew (some seconds)."""
    torch.set_num_threads(1)
    made = [make() for make in circuits.ALL.values()]
    lines = [HEAD]
    for name, known in zip(circuits.ALL, made, strict=True):
        lines.append(f"**{known.name}** (`{name}`)  \n{_about(circuits.ALL[name])}\n")
    lines.append(COLUMNS)
    both = []
    for name, known in zip(circuits.ALL, made, strict=True):
        assert known.control is not None
        control = known.control()
        both += [known, control]
        lines.append(
            ROW.format(
                name=name,
                heads=_names(known.heads),
                feeds=", ".join(f"L{layer}" for layer in sorted(known.feeds)) or "none",
                decoys=len(known.decoys),
                control=_names(control.heads),
            )
        )
    lines.append(FOUND)
    for known in both:
        lines += _found(known)
    chosen = [both[at] for at in (0, 1, 2)]
    rows = [
        f"| {method} | " + " | ".join(f"{_hits(one, method):.2f}" for one in chosen) + " |"
        for method in METHODS
    ]
    lines.append(
        TAIL.format(
            names=" | ".join(one.name for one in chosen),
            rule=" | ".join("---" for _ in chosen),
            rows="\n".join(rows),
        )
    )
    return "\n".join(lines)


def _about(make: Any) -> str:
    """The docstring's first two paragraphs: the circuit, and what is beside it."""
    said = inspect.getdoc(make) or ""
    return "\n".join(wrap(" ".join(" ".join(said.split("\n\n")[:2]).split()), 100))


def _names(heads: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"L{layer}H{head}" for layer, head in sorted(heads))


def _found(known: KnownCircuit) -> list[str]:
    """A row for every head that any of the causal instruments names."""
    pair = known.contrast(PAIRS, 0)
    metric = LogitDifference(pair.right, pair.wrong, pair.at)
    atlas = ablation(known.model, pair.clean, metric)
    where = zip(atlas.heads["layer"], atlas.heads["head"], strict=True)
    places = [(int(layer), int(head)) for layer, head in where]
    columns = [dict(zip(places, map(float, atlas.heads["effect"]), strict=True))]
    for method in ("exact", "gradient", "integrated"):
        table = patch(known.model, pair.clean, pair.corrupted, metric, "heads", method=method)
        columns.append({place: float(table.normalised[place]) for place in places})
    found = find_circuit(known.model, pair.clean, pair.corrupted, metric, mlps="hold")
    paths = {(str(edge.sender), str(edge.receiver)) for edge in found.edges}
    right = len(paths & {tuple(edge) for edge in known.edges})
    rows: list[str] = []
    for place in places:
        told = [column[place] for column in columns]
        if max(map(abs, told)) < 0.01:
            continue
        cells = " | ".join(f"{x + 0.0:+.1f}".replace("-0.0", "+0.0") for x in told)
        mine = f"| {known.name if not rows else ''} | {_names([place])} | {cells} | "
        rows.append(mine + (f"{len(paths)}, {right} known |" if not rows else "|"))
    return rows


def _hits(known: KnownCircuit, method: str) -> float:
    """How often the highest score is at the token that is copied."""
    pair = known.contrast(PAIRS, 0)
    metric = LogitDifference(pair.right, pair.wrong, pair.at)
    found = attribute(known.model, pair.clean, target=metric, method=method)
    right = pair.clean["input_ids"] == pair.right[:, None]
    return float((np.stack(list(found.scores)).argmax(1) == right.long().argmax(1).numpy()).mean())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
