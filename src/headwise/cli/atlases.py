"""Commands that read atlases: show one, write its report, compare two."""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from headwise.cli.errors import UserError, one_line
from headwise.cli.sources import closest
from headwise.cli.tables import kinds_found, measured_on, table
from headwise.instruments import Atlas
from headwise.instruments.atlas import AtlasFileError

# What is shown of a head unless columns are asked for.
_SHOWN = (
    "stack", "attention", "layer", "head", "kind", "sink_mass", "entropy", "effective_keys",
    "mean_distance", "previous_token_score", "induction_score", "retrieval_score",
    "dormant_share", "residual_share", "similarity",
)  # fmt: skip


def load_atlas(path: Path) -> Atlas:
    """The atlas in a file or in the folder of a run. Raises UserError if there is none."""
    path = path.expanduser()
    try:
        return Atlas.load(path)
    except FileNotFoundError:
        raise UserError(
            f"no atlas at {path}; expected a file written by `headwise see`, or its folder"
        ) from None
    except AtlasFileError as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def show(options: argparse.Namespace) -> int:
    """Print the table of heads (or layers) as text, JSON or CSV."""
    atlas = load_atlas(options.atlas)
    columns = atlas.layers if options.layers else atlas.heads
    for name in [*(options.columns or ()), *([options.sort] if options.sort else [])]:
        if name not in columns:
            raise UserError(closest(name, columns, "column"))
    rows = list(range(len(next(iter(columns.values()), ()))))
    if options.kind is not None:
        rows = _of_kind(atlas, options)
    if options.sort:
        rows = _sorted(columns[options.sort], rows, options.ascending)
    rows = rows[: options.rows]
    everything = options.json or options.csv or options.layers
    chosen = options.columns or [n for n in (columns if everything else _SHOWN) if n in columns]
    records = [[columns[name][row].item() for name in chosen] for row in rows]
    if options.json:
        print(
            json.dumps(
                [dict(zip(chosen, map(_json, record), strict=True)) for record in records], indent=2
            )
        )
    elif options.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(chosen)
        writer.writerows([["" if _missing(v) else v for v in record] for record in records])
    else:
        print(measured_on(atlas))
        print(table(chosen, records))
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the HTML report of an atlas and print its path."""
    atlas = load_atlas(options.atlas)
    from headwise.report import write

    source = options.atlas.expanduser()
    out = options.out or (source if source.is_dir() else source.parent) / "report.html"
    print(write(atlas, out))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Print what changed between two atlases, by head; write it as a page where asked."""
    first, second = load_atlas(options.first), load_atlas(options.second)
    try:
        comparison = first.compare(second)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if options.json:
        rows = {
            name: list(map(_json, values.tolist())) for name, values in comparison.table().items()
        }
        print(json.dumps({
            "a": comparison.models[0], "b": comparison.models[1],
            "warnings": comparison.warnings,
            "only_a": comparison.only_a, "only_b": comparison.only_b,
            "heads": [dict(zip(rows, record, strict=True))
                      for record in zip(*rows.values(), strict=True)],
        }, indent=2))  # fmt: skip
    else:
        print(comparison.text(options.rows))
    if options.html is not None:
        from headwise.report import compare as write_page

        written = write_page(comparison, options.html.expanduser())
        print(written, file=sys.stderr if options.json else sys.stdout)
    return 0


def _of_kind(atlas: Atlas, options: argparse.Namespace) -> list[int]:
    from headwise.instruments.kinds import KINDS

    if options.layers:
        raise UserError("--kind is about heads; it does not go with --layers")
    if "kind" not in atlas.heads:
        raise UserError("this atlas has no kinds; measure with the instruments that decide them")
    kinds = atlas.heads["kind"].tolist()
    if options.kind not in {*KINDS, *kinds}:
        raise UserError(closest(options.kind, KINDS, "kind"))
    rows = [row for row, kind in enumerate(kinds) if kind == options.kind]
    if not rows and not (options.json or options.csv):
        print(f"no head is {options.kind}; there are:\n{kinds_found(atlas)}", file=sys.stderr)
    return rows


def _sorted(values: np.ndarray, rows: list[int], ascending: bool) -> list[int]:
    """Rows by value, those not measured at the end either way."""
    known = [row for row in rows if not _missing(values[row])]
    known.sort(key=lambda row: values[row], reverse=not ascending)
    return known + [row for row in rows if _missing(values[row])]


def _missing(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
