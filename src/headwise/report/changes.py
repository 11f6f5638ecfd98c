"""What changed between two atlases, as content for the same page: heads by their differences."""

from collections import Counter
from typing import Any

import numpy as np

from headwise.instruments.atlas import Atlas, Column
from headwise.instruments.columns import COLUMNS
from headwise.instruments.compare import BETWEEN_HEADS, STANDARD_ERRORS, Comparison
from headwise.report.naming import label
from headwise.report.payload import Detail, numbers, payload

__all__ = ["changes"]

_LARGEST = 20


def changes(comparison: Comparison, detail: Detail, title: str | None = None) -> dict[str, Any]:
    """The page's content: each number of a head is its change, after minus before."""
    before, after = comparison.models
    content = payload(_differences(comparison), detail, title or f"{before} → {after}")
    for column in content["columns"]:
        name = column["name"]
        column["label"] = f"change of {label(name)}"
        column["before"] = numbers(comparison.a[name], detail.digits)
        column["after"] = numbers(comparison.b[name], detail.digits)
    largest = {unit: _largest(comparison, unit) for unit in (STANDARD_ERRORS, BETWEEN_HEADS)}
    first = next((rows[0] for rows in largest.values() if rows), None)
    rows = {name: row for row, name in enumerate(comparison.names)}
    return content | {
        "eyebrow": "What changed, head by head",
        "sentences": _sentences(comparison, first),
        "facts": _facts(comparison),
        "notes": [*comparison.warnings, *_alone(comparison)],
        "metric": first["column"] if first else "kind",
        "changes": {
            "kinds": [
                [rows[head], old, new] for head, old, new in comparison.changed_kinds()
            ],
            "largest": largest,
        },
    }  # fmt: skip


def _differences(comparison: Comparison) -> Atlas:
    kinds = {} if comparison.kinds is None else {"kind": comparison.kinds[1]}
    reasons = []
    if comparison.kinds is not None:
        reasons = [
            f"was and is {new}" if old == new else f"was {old}, is {new}"
            for old, new in zip(*comparison.kinds, strict=True)
        ]
    described = {name: COLUMNS.get(name) or Column(name, "", "") for name in comparison.a}
    return Atlas(
        heads={**comparison.identity, **kinds, **comparison.difference},
        columns={
            name: Column(
                name,
                "" if column.unit in ("share", "score") else column.unit,
                f"Change, after minus before, of: {column.description}",
                column.source,
            )
            for name, column in described.items()
        },
        spread={name: errors for name, errors in comparison.errors.items()
                if np.isfinite(errors).any()},
        reasons=reasons,
        provenance={"before": comparison.models[0], "after": comparison.models[1]},
    )  # fmt: skip


def _largest(comparison: Comparison, unit: str) -> list[dict[str, Any]]:
    rows = {name: row for row, name in enumerate(comparison.names)}
    return [
        {"row": rows[change.head], "column": change.column, "label": label(change.column),
         "before": change.a, "after": change.b, "size": round(change.size, 2)}
        for change in comparison.largest(_LARGEST, unit=unit)
        if np.isfinite([change.a, change.b, change.size]).all()
    ]  # fmt: skip


def _sentences(comparison: Comparison, first: dict[str, Any] | None) -> list[str]:
    words = []
    if comparison.kinds is not None:
        changed = comparison.changed_kinds()
        ways = Counter((old, new) for _, old, new in changed)
        most = ", ".join(
            f"{count} from {old} to {new}" for (old, new), count in ways.most_common(3)
        )
        of = f"{len(changed) or 'None'} of {len(comparison)} heads changed their kind"
        often = f", most often {most}" if len(ways) > 3 else f": {most}" if most else ""
        words.append(f"{of}{often}.")
    if first is not None:
        words.append(
            f"The largest change is the {first['label']} of {comparison.names[first['row']]}, "
            f"from {first['before']:.3g} to {first['after']:.3g}."
        )
    elif not words:
        words.append(f"No number of the {len(comparison)} heads changed.")
    return words


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = [("heads in both", f"{len(comparison):,}"), ("numbers of each", f"{len(comparison.a)}")]
    if comparison.kinds is not None:
        facts.append(("kinds changed", f"{len(comparison.changed_kinds()):,}"))
    return facts


def _alone(comparison: Comparison) -> list[str]:
    """What only one of the two has."""
    before, after = comparison.models
    found = []
    for which, model, heads, columns in (
        ("before", before, comparison.only_a, comparison.columns_only_a),
        ("after", after, comparison.only_b, comparison.columns_only_b),
    ):
        if heads:
            more = f" and {len(heads) - 8} more" if len(heads) > 8 else ""
            found.append(f"{len(heads)} heads only {which} ({model}): {', '.join(heads[:8])}{more}")
        if columns:
            found.append(f"columns only {which} ({model}): {', '.join(columns)}")
    return found
