"""Kinds: rows made by hand near the thresholds, and the numbers in the reasons."""

import dataclasses
import inspect
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.instruments import kinds
from headwise.instruments.columns import COLUMNS
from headwise.instruments.kinds import KINDS, RULES, THRESHOLDS, Thresholds, evidence, label

USED = sorted({c.column for rule in RULES for c in rule.conditions})
# well below every threshold: a head that does nothing in particular
QUIET = dict.fromkeys(USED, 0.05)


def just_below(value: float) -> float:
    return math.nextafter(value, 0.0)


def reasons_value(reason: str, column: str) -> float:
    found = re.search(rf"\b{column} (-?[\d.]+)", reason)
    assert found, reason
    return float(found.group(1))


@pytest.mark.parametrize(
    ("kind", "column", "threshold"),
    [
        ("previous-token", "previous_token_score", 0.4),
        ("previous-token", "previous_mass", 0.4),
        ("induction", "induction_score", 0.4),
        ("duplicate", "duplicate_token_score", 0.4),
        ("retrieval", "retrieval_score", 0.1),
        ("broad", "entropy_share", 0.75),
        ("sink", "sink_mass", 0.5),
        ("sink", "found_sink_mass", 0.5),
        ("delimiter", "delimiter_mass", 0.5),
        ("local", "local_8", 0.5),
    ],
)
def test_each_threshold_decides_alone(kind: str, column: str, threshold: float) -> None:
    assert label(QUIET | {column: threshold})[0] == kind
    assert label({column: threshold})[0] == kind  # whatever else was not measured
    assert label(QUIET | {column: just_below(threshold)})[0] == "mixed"
    assert label({column: just_below(threshold)})[0] == "mixed"
    # and moving the threshold moves the label: it stands in one place
    names = {c.threshold for rule in RULES for c in rule.conditions if c.column == column}
    raised = dataclasses.replace(THRESHOLDS, **dict.fromkeys(names, threshold + 0.1))
    assert label(QUIET | {column: threshold + 0.05}, raised)[0] == "mixed"
    assert label(QUIET | {column: threshold + 0.15}, raised)[0] == kind


def test_reasons_print_the_number_and_the_threshold() -> None:
    assert label({"induction_score": 0.834, "induction_text": math.nan}) == (
        "induction",
        "induction_score 0.83 >= 0.40 (repeated random tokens)",
    )
    assert label({"sink_mass": 0.912, "dormant_share": 1.0}) == (
        "sink",
        "sink_mass 0.91 >= 0.50 (first token); dormant_share 1.00",
    )


def test_a_reason_never_reads_as_if_it_were_false() -> None:
    # 0.4999 must not be printed as "0.50 < 0.50"
    _, reason = label(QUIET | {"sink_mass": 0.4999})
    assert "sink_mass 0.4999 < 0.50" in reason
    _, reason = label(QUIET | {"sink_mass": 0.5001})
    assert "sink_mass 0.5001 >= 0.50" in reason


def test_mixed_says_what_came_nearest() -> None:
    kind, reason = label(QUIET | {"sink_mass": 0.45, "local_8": 0.3, "previous_mass": 0.2})
    assert kind == "mixed"
    assert reason.startswith("no threshold is met; nearest: sink_mass 0.45 < 0.50 (first token)")
    assert reason.index("sink_mass") < reason.index("local_8") < reason.index("previous_mass")
    assert "entropy_share" not in reason


def test_nothing_measured_is_no_kind() -> None:
    for row in ({}, dict.fromkeys(USED, math.nan), {"ov_copying": 0.9}, {"sink_mass": None}):
        kind, reason = label(row)
        assert kind == "unmeasured"
        assert kind not in KINDS
        assert "sink_mass" in reason


@given(
    st.dictionaries(st.sampled_from(USED), st.floats(-1, 1) | st.just(math.nan)),
    st.sampled_from(USED),
)
def test_nan_never_justifies(row: dict[str, float], column: str) -> None:
    """NaN is the same as no column at all, and every printed number is a measured one."""
    with_nan = {name: value for name, value in row.items() if name != column}
    assert label(with_nan | {column: math.nan}) == label(with_nan)
    kind, reason = label(row)
    assert "nan" not in reason
    if kind in KINDS and kind != "mixed":
        # each condition that the reason states is true of the row
        stated = re.findall(r"(\w+) -?[\d.]+ >= ([\d.]+)", reason)
        assert stated
        assert all(row[name] >= float(limit) for name, limit in stated)


def test_positional_needs_both_where_both_are_measured() -> None:
    at = THRESHOLDS.positional
    quiet = {name: value for name, value in QUIET.items() if name != "positional_random"}
    kind, reason = label(quiet | {"positional": at, "positional_random": at})
    assert kind == "positional"
    assert reasons_value(reason, "positional_random") == at
    assert label(quiet | {"positional": at, "positional_random": just_below(at)})[0] == "mixed"
    assert label(quiet | {"positional": just_below(at), "positional_random": at})[0] == "mixed"
    # on images there are no random tokens: the number given says so
    kind, reason = label(quiet | {"positional": at, "positional_random": math.nan})
    assert kind == "positional"
    assert "positional_random not measured" in reason
    # it is a second witness only: alone it justifies nothing
    assert label(quiet | {"positional_random": 1.0})[0] == "mixed"
    assert label({"positional_random": 1.0})[0] == "unmeasured"
    # the reason of a refuted one names what refuted it
    _, reason = label({"positional": 0.9, "positional_random": 0.2})
    assert reason == "no threshold is met; nearest: positional_random 0.20 < 0.60 (random tokens)"


def test_the_order_is_the_documented_one() -> None:
    assert KINDS == (
        "previous-token",
        "induction",
        "duplicate",
        "retrieval",
        "broad",
        "sink",
        "delimiter",
        "positional",
        "local",
        "mixed",
    )
    doc = str(kinds.__doc__)
    places = [doc.index(kind) for kind in ("previous-token", "broad,", "positional,", "mixed:")]
    assert places == sorted(places)
    everything = dict.fromkeys(USED, 1.0)
    assert [kind for kind, _ in evidence(everything)] == list(KINDS[:-1])
    by_kind = {
        kind: [c.column for rule in RULES if rule.kind == kind for c in rule.conditions]
        for kind in KINDS
    }
    # taking away the columns of one kind after the other walks down the list
    for first, second in pairwise(KINDS):
        assert label(everything)[0] == first
        everything |= dict.fromkeys(by_kind[first], 0.0)
        assert label(everything)[0] == second


def test_a_parked_induction_head_is_an_induction_head() -> None:
    row = QUIET | {"sink_mass": 0.8, "dormant_share": 1.0, "induction_score": 0.7}
    assert label(row)[0] == "induction"
    assert [kind for kind, _ in evidence(row)] == ["induction", "sink"]


def test_even_attention_is_broad_at_any_length() -> None:
    """The columns of a head that weighs all keys alike, computed from its matrix."""
    for n in (4, 16, 64, 1024):
        i, j = np.indices((n, n))
        p = (j <= i) / (i + 1.0)
        row = {
            "sink_mass": p[:, 0].mean(),
            "entropy_share": 1.0,
            "local_8": (p * (abs(i - j) < 8)).sum() / n,
            "previous_mass": p.diagonal(-1).sum() / n,
        }
        assert label(row)[0] == "broad", n


def test_thresholds_are_documented_one_by_one() -> None:
    source = inspect.getsource(Thresholds)
    for field in dataclasses.fields(Thresholds):
        assert re.search(rf'{field.name}: float = [\d.]+\n    """[^"]{{30,}}', source), field.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        THRESHOLDS.sink = 0.1  # type: ignore[misc]


def test_rules_ask_for_columns_that_exist() -> None:
    for rule in RULES:
        for name in [c.column for c in rule.conditions] + list(rule.beside):
            assert name in COLUMNS
        assert any(not c.if_measured for c in rule.conditions)


def test_a_whole_table() -> None:
    names, reasons = kinds.label_all(
        {"layer": np.arange(3), "sink_mass": np.array([0.9, np.nan, 0.2]), "kind": ["", "", ""]}
    )
    assert names == ["sink", "unmeasured", "mixed"]
    assert reasons[0].startswith("sink_mass 0.90")
    assert kinds.label_all({}) == ([], [])
