"""Two atlases side by side: what changed, by head, and whether they may be compared at all."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.instruments.atlas import IDENTITY, Atlas
from headwise.instruments.columns import COLUMNS
from headwise.instruments.contrast import contrast

if TYPE_CHECKING:
    import pandas

__all__ = ["Change", "Comparison", "compare"]

STANDARD_ERRORS = "standard errors"
BETWEEN_HEADS = "deviations between heads"


@dataclass(frozen=True)
class Change:
    """One number of one head, in both atlases.

    size: |b - a| in `unit`: standard errors of the difference where both atlases know theirs,
    else standard deviations of the column over the heads of both.
    """

    head: str
    column: str
    a: float
    b: float
    size: float
    unit: str

    @property
    def difference(self) -> float:
        """b - a, in the unit of the column."""
        return self.b - self.a


@dataclass(eq=False, repr=False)
class Comparison:
    """What changed from atlas a to atlas b, in the heads that both have.

    names: (n,) short names of the shared heads, in the order of a.
    identity: key -> (n,) array of what tells the heads apart.
    a, b: column -> (n,) float64 of the columns that both have; NaN: not measured.
    errors: column -> (n,) standard error of b - a; NaN where one atlas does not know its own.
    kinds: (kinds in a, kinds in b), (n,) each, or None where one atlas has none.
    only_a, only_b: names of the heads that only one has; columns_only_a, columns_only_b likewise.
    warnings: differences in model, text, precision ... in words.
    """

    names: list[str]
    identity: dict[str, np.ndarray]
    a: dict[str, np.ndarray]
    b: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    kinds: tuple[np.ndarray, np.ndarray] | None
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    columns_only_a: list[str] = field(default_factory=list)
    columns_only_b: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    models: tuple[str, str] = ("a", "b")

    def __len__(self) -> int:
        """The number of heads in both."""
        return len(self.names)

    @property
    def difference(self) -> dict[str, np.ndarray]:
        """Column -> (n,) b - a."""
        return {name: _minus(self.b[name], self.a[name]) for name in self.a}

    def changed_kinds(self) -> list[tuple[str, str, str]]:
        """(head, kind in a, kind in b) of the heads whose kind changed."""
        if self.kinds is None:
            return []
        pairs = zip(self.names, *(kinds.tolist() for kinds in self.kinds), strict=True)
        return [(head, before, after) for head, before, after in pairs if before != after]

    def largest(
        self, n: int = 10, column: str | None = None, unit: str | None = None
    ) -> list[Change]:
        """The n largest changes, of one column or of all, those in standard errors first.

        The two units do not compare, so one list never mixes their order; `unit` picks one.
        Raises KeyError for a column that the two do not share.
        """
        if column is not None and column not in self.a:
            raise KeyError(f"no shared column {column!r}; shared: {', '.join(self.a)}")
        found = []
        for name in self.a if column is None else [column]:
            gap = np.abs(_minus(self.b[name], self.a[name]))
            errors = self.errors[name]
            between = _deviation(np.concatenate([self.a[name], self.b[name]]))
            for row in np.flatnonzero(gap > 0):
                known = errors[row] > 0
                size = gap[row] / (errors[row] if known else between)
                found.append(Change(
                    self.names[row], name, float(self.a[name][row]), float(self.b[name][row]),
                    float(size), STANDARD_ERRORS if known else BETWEEN_HEADS,
                ))  # fmt: skip
        found = [change for change in found if unit in (None, change.unit)]
        return sorted(found, key=lambda c: (c.unit != STANDARD_ERRORS, -c.size))[:n]

    def table(self) -> dict[str, np.ndarray]:
        """One row a shared head: identity, kind_a, kind_b, and <column>_a, _b, _change of each."""
        table = dict(self.identity)
        if self.kinds is not None:
            table |= {"kind_a": self.kinds[0], "kind_b": self.kinds[1]}
        for name, change in self.difference.items():
            table |= {
                f"{name}_a": self.a[name],
                f"{name}_b": self.b[name],
                f"{name}_change": change,
            }
            if not np.isnan(self.errors[name]).all():
                table[f"{name}_change_se"] = self.errors[name]
        return table

    def frame(self) -> "pandas.DataFrame":
        """`table` as a pandas data frame. Raises ImportError without pandas (extra: frame)."""
        return Atlas(heads=self.table()).frame()

    def text(self, n: int = 10) -> str:
        """A plain table to read: warnings, kinds that changed, columns, the n largest changes."""
        from headwise.instruments.comparison_text import as_text

        return as_text(self, n)

    def __repr__(self) -> str:
        return self.text()


def compare(a: Atlas, b: Atlas) -> Comparison:
    """Join two atlases on (stack, attention, layer, head) and take the differences.

    Heads and columns that only one has are listed, not compared. Raises ValueError where the two
    share no head or no measured column, or where rows cannot be told apart by what both have.
    """
    keys = [key for key in IDENTITY if key in a.heads and key in b.heads]
    at_a, at_b = _places(a, keys), _places(b, keys)
    shared = [place for place in at_a if place in at_b]
    if not shared:
        raise ValueError(
            f"the atlases share no head: one has {_extent(a)}, the other {_extent(b)}; compare "
            "atlases of models with the same layers and heads, or of one model before and after"
        )
    rows_a = np.array([at_a[place] for place in shared])
    rows_b = np.array([at_b[place] for place in shared])
    metrics = {name: (_is_metric(a, name), _is_metric(b, name)) for name in {**a.heads, **b.heads}}
    columns = [name for name, (in_a, in_b) in metrics.items() if in_a and in_b]
    if not columns:
        raise ValueError(
            "the atlases share no measured column: one has "
            f"{', '.join(n for n, (in_a, _) in metrics.items() if in_a) or 'none'}, the other "
            f"{', '.join(n for n, (_, in_b) in metrics.items() if in_b) or 'none'}; measure both "
            "with the same instruments"
        )
    kinds = None
    if "kind" in a.heads and "kind" in b.heads:
        kinds = (a.heads["kind"][rows_a], b.heads["kind"][rows_b])
    return Comparison(
        names=[a.name(row) for row in rows_a],
        identity={key: a.heads[key][rows_a] for key in keys},
        a={name: a.heads[name][rows_a].astype(np.float64) for name in columns},
        b={name: b.heads[name][rows_b].astype(np.float64) for name in columns},
        errors={name: np.hypot(_error(a, name, rows_a), _error(b, name, rows_b))
                for name in columns},
        kinds=kinds,
        only_a=[a.name(row) for place, row in at_a.items() if place not in at_b],
        only_b=[b.name(row) for place, row in at_b.items() if place not in at_a],
        columns_only_a=[name for name, (in_a, in_b) in metrics.items() if in_a and not in_b],
        columns_only_b=[name for name, (in_a, in_b) in metrics.items() if in_b and not in_a],
        warnings=contrast(a.provenance, b.provenance),
        models=(str(a.provenance.get("model") or "a"), str(b.provenance.get("model") or "b")),
    )  # fmt: skip


def _places(atlas: Atlas, keys: list[str]) -> dict[tuple[Any, ...], int]:
    places: dict[tuple[Any, ...], int] = {}
    for row in range(len(atlas)):
        place = tuple(atlas.heads[key][row].item() for key in keys)
        if place in places:
            missing = [key for key in IDENTITY if key in atlas.heads and key not in keys]
            raise ValueError(
                f"{atlas.name(places[place])} and {atlas.name(row)} are the same head by "
                f"{', '.join(keys)}" + (f": the other atlas has no column {' or '.join(missing)}, "
                "so it is of another kind of model" if missing else " in one atlas")
            )  # fmt: skip
        places[place] = row
    return places


def _is_metric(atlas: Atlas, name: str) -> bool:
    """A number that can grow or shrink: no name, and no index of a row, layer or head."""
    if name not in atlas.heads or name in IDENTITY:
        return False
    column = atlas.columns.get(name) or COLUMNS.get(name)
    is_index = column is not None and column.unit == "index"
    return not is_index and atlas.heads[name].dtype.kind in "fiub"


def _error(atlas: Atlas, name: str, rows: np.ndarray) -> np.ndarray:
    spread = atlas.spread.get(name)
    return np.full(len(rows), np.nan) if spread is None else spread[rows].astype(np.float64)


def _minus(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # inf - inf: not measurable, so NaN
        return b - a


def _deviation(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.std()) if len(known) else float("nan")


def _extent(atlas: Atlas) -> str:
    return f"{len(atlas)} heads in {len(set(atlas.heads['layer'].tolist()))} layers"
