"""Comparisons of atlases: joins, differences, their size, and warnings in words."""

import re
from typing import Any

import numpy as np
import pytest

import headwise.instruments as room
from headwise.instruments.atlas import Atlas
from headwise.instruments.compare import BETWEEN_HEADS, STANDARD_ERRORS, Comparison, compare

PROVENANCE: dict[str, Any] = {
    "model": "toy",
    "weights_hash": "sha256:aaaaaaaaaaaaaaaaaaaa",
    "texts": [{"name": "t", "sha256": "11", "tokens": 100}],
    "dtype": "float32",
    "device": "cpu",
    "versions": {"headwise": "1", "torch": "2"},
    "settings": {"seed": 0},
    "seconds": 1.0,
    "date": "today",
}


def an_atlas(heads: dict[str, Any] | None = None, **parts: Any) -> Atlas:
    given: dict[str, Any] = {
        "layer": np.array([0, 0, 1, 1]),
        "head": np.array([0, 1, 0, 1]),
        "kind": np.array(["sink", "mixed", "local", "mixed"]),
        "entropy": np.array([1.0, 2.0, 3.0, np.nan]),
        "sink_mass": np.array([0.9, 0.1, 0.2, 0.3]),
        "similar_to": np.array([1, 0, 3, 2]),
    }
    return Atlas(heads=given | (heads or {}), **({"provenance": PROVENANCE} | parts))


def test_equal_atlases_do_not_differ() -> None:
    result = an_atlas().compare(an_atlas())
    assert len(result) == 4
    assert result.warnings == []
    assert result.changed_kinds() == []
    assert result.largest() == []
    assert "No head changed its kind." in result.text()
    assert "!" not in result.text()


def test_rows_are_joined_by_head_not_by_place() -> None:
    order = np.array([3, 1, 0, 2])
    a = an_atlas()
    shuffled = an_atlas({name: values[order] for name, values in a.heads.items()})
    result = compare(a, shuffled)
    assert result.names == ["L0H0", "L0H1", "L1H0", "L1H1"]
    np.testing.assert_array_equal(result.difference["sink_mass"], np.zeros(4))
    assert result.changed_kinds() == []


def test_differences_and_what_is_not_one() -> None:
    b = an_atlas(
        {
            "entropy": np.array([1.5, np.nan, 2.0, 4.0]),
            "kind": np.array(["sink", "broad", "local", "induction"]),
        }
    )
    result = compare(an_atlas(), b)
    np.testing.assert_array_equal(result.difference["entropy"], [0.5, np.nan, -1.0, np.nan])
    assert list(result.a) == ["entropy", "sink_mass"]  # no names, no row numbers
    assert result.changed_kinds() == [("L0H1", "mixed", "broad"), ("L1H1", "mixed", "induction")]
    assert result.table()["entropy_change"].tolist()[0] == 0.5


def test_sizes_in_standard_errors_where_both_are_known() -> None:
    a = an_atlas(spread={"sink_mass": np.array([0.03, 0.03, 0.03, np.nan])})
    b = an_atlas(
        {"sink_mass": np.array([0.8, 0.15, 0.2, 0.9]), "entropy": np.array([1.0, 2.5, 3.0, 4.0])},
        spread={"sink_mass": np.array([0.04, 0.04, 0.04, 0.04])},
    )
    result = compare(a, b)
    first, second, *rest = result.largest()
    assert (first.head, first.column, first.unit) == ("L0H0", "sink_mass", STANDARD_ERRORS)
    assert first.size == pytest.approx(0.1 / 0.05)  # hypot(0.03, 0.04)
    assert first.difference == pytest.approx(-0.1)
    assert second.size == pytest.approx(1.0)
    # without both errors: deviations of the column over the heads of both
    assert {c.unit for c in rest} == {BETWEEN_HEADS}
    pooled = np.std([0.9, 0.1, 0.2, 0.3, 0.8, 0.15, 0.2, 0.9])
    assert [(c.head, c.column) for c in rest] == [("L1H1", "sink_mass"), ("L0H1", "entropy")]
    assert rest[0].size == pytest.approx(0.6 / pooled)
    assert [c.column for c in result.largest(column="entropy")] == ["entropy"]
    assert len(result.largest(1)) == 1
    assert all(c.unit == BETWEEN_HEADS for c in result.largest(unit=BETWEEN_HEADS))
    with pytest.raises(KeyError, match="no shared column 'x'; shared: entropy, sink_mass"):
        result.largest(column="x")


def test_an_error_of_zero_makes_no_infinity() -> None:
    zero = {"sink_mass": np.zeros(4)}
    b = an_atlas({"sink_mass": np.array([0.9, 0.1, 0.2, 0.5])}, spread=zero)
    (change,) = compare(an_atlas(spread=zero), b).largest()
    assert change.unit == BETWEEN_HEADS
    assert np.isfinite(change.size)


def test_heads_of_different_stacks_are_kept_apart() -> None:
    place = {
        "stack": np.array(["encoder", "decoder", "decoder"]),
        "attention": np.array(["self", "self", "cross"]),
        "layer": np.zeros(3, int),
        "head": np.zeros(3, int),
    }
    a = Atlas(heads=place | {"entropy": np.array([1.0, 2.0, 3.0])})
    back = {name: values[::-1] for name, values in place.items()}
    b = Atlas(heads=back | {"entropy": np.array([30.0, 20.0, 10.0])})
    result = compare(a, b)
    assert result.difference["entropy"].tolist() == [9.0, 18.0, 27.0]
    assert result.names[2] == "decoder cross L0H0"
    with pytest.raises(ValueError, match="the other atlas has no column stack or attention"):
        compare(a, an_atlas())
    # one stack on one side, none named on the other: nothing to mix up
    named = an_atlas({"stack": np.array(["decoder"] * 4)})
    assert len(compare(named, an_atlas())) == 4


def test_pruned_heads_are_listed() -> None:
    keep = np.array([0, 2])
    b = an_atlas({name: values[keep] for name, values in an_atlas().heads.items()})
    result = compare(an_atlas(), b)
    assert result.names == ["L0H0", "L1H0"]
    assert result.only_a == ["L0H1", "L1H1"]
    assert result.only_b == []
    assert "2 heads only in a: L0H1, L1H1" in result.text()


def test_nothing_in_common() -> None:
    other = an_atlas({"layer": np.array([7, 7, 8, 8])})
    with pytest.raises(ValueError, match="share no head: one has 4 heads in 2 layers"):
        compare(an_atlas(), other)
    heads = {"layer": np.array([0]), "head": np.array([0])}
    with pytest.raises(ValueError, match=r"share no measured column: one has entropy.*own_metric"):
        compare(an_atlas(), Atlas(heads=heads | {"own_metric": np.ones(1)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"texts": [{"name": "u", "sha256": "22", "tokens": 100}]},
            r"different texts \(t against u; 0 in common\): figures are only comparable on the",
        ),
        (
            {"texts": [{"name": "renamed", "sha256": "11", "tokens": 200}]},
            "the same text, but 100 tokens against 200",
        ),
        ({"texts": []}, "one atlas does not name its texts"),
        ({"model": "other", "weights_hash": "x"}, "different models: toy against other"),
        (
            {"weights_hash": "sha256:bbbbbbbbbbbbbbbbbb"},
            r"same model name \(toy\), but different weights \(hash aaaaaaaaaaaa against bbbbbbb",
        ),
        ({"dtype": "bfloat16"}, "computed in float32 against bfloat16"),
        ({"device": "cuda"}, "computed on cpu against cuda"),
        ({"versions": {"headwise": "1", "torch": "3"}}, "different versions: torch 2 against 3"),
        ({"settings": {"seed": 1}}, "different settings: seed 0 against 1"),
        ({"settings": {"seed": 0, "rows": 5}}, "rows not given against 5"),
    ],
)
def test_provenance_in_words(change: dict[str, Any], words: str) -> None:
    result = compare(an_atlas(), an_atlas(provenance=PROVENANCE | change))
    (warning,) = result.warnings
    assert re.search(words, warning)
    assert f"! {warning}" in result.text()


def test_provenance_that_does_not_matter() -> None:
    same_weights = PROVENANCE | {"model": "copy", "seconds": 9.0, "date": "x", "command": "y"}
    assert compare(an_atlas(), an_atlas(provenance=same_weights)).warnings == []
    (warning,) = compare(an_atlas(provenance={}), an_atlas(provenance={})).warnings
    assert "neither atlas names its texts" in warning
    revisions = [{"model": "m", "texts": PROVENANCE["texts"], "revision": r} for r in "ab"]
    result = compare(*(an_atlas(provenance=p) for p in revisions))
    assert result.warnings == ["different revisions of m: a against b"]


def test_text_is_a_table() -> None:
    b = an_atlas(
        {
            "sink_mass": np.array([0.9, 0.1, 0.2, 0.8]),
            "kind": np.array(["sink", "mixed", "local", "sink"]),
            "induction_score": np.ones(4),
        }
    )
    text = compare(an_atlas(), b).text()
    assert "mixed -> sink: 1 (L1H1)" in text
    assert "columns only in b: induction_score" in text
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("sink_mass")]
    assert line.split() == [
        "sink_mass", "4", "0.375", "0.500", "+0.125", "0.125", "+0.500", "at", "L1H1",
    ]  # fmt: skip
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("entropy")]
    assert line.split()[-1] == "none"
    table = [line for line in text.splitlines() if line.startswith("  L1H1")]
    assert len(table) == 1
    assert "deviations between heads" in text
    assert repr(compare(an_atlas(), b)) == text


def test_columns_nobody_measured_are_shown_as_such() -> None:
    nothing = {"entropy": np.full(4, np.nan)}
    text = compare(an_atlas(nothing), an_atlas(nothing)).text()
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("entropy")]
    assert line.split() == ["entropy", "0"]


def test_infinite_values_do_not_break_it() -> None:
    infinite = an_atlas({"entropy": np.array([np.inf, np.inf, -np.inf, 1.0])})
    result = compare(infinite, infinite)
    assert result.largest() == []
    assert "entropy" in compare(infinite, an_atlas()).text()


def test_frame() -> None:
    pytest.importorskip("pandas")
    frame = compare(an_atlas(spread={"entropy": np.ones(4)}),
                    an_atlas(spread={"entropy": np.ones(4)})).frame()  # fmt: skip
    assert list(frame.columns) == [
        "layer", "head", "kind_a", "kind_b",
        "entropy_a", "entropy_b", "entropy_change", "entropy_change_se",
        "sink_mass_a", "sink_mass_b", "sink_mass_change",
    ]  # fmt: skip
    assert frame["entropy_change_se"].iloc[0] == pytest.approx(2**0.5)


def test_the_room_gives_functions_whichever_import_came_first() -> None:
    import headwise.instruments.compare  # noqa: F401 - binds a module, if nothing prevents it

    assert room.compare is compare
    assert room.Comparison is Comparison
    assert callable(room.compare)
