"""The page that compares two atlases."""

import copy
from pathlib import Path

import numpy as np
import pytest

from headwise.instruments.atlas import Atlas
from headwise.instruments.compare import Comparison
from headwise.report import compare
from tests.report.browser import driven
from tests.report.synthetic import decoder
from tests.report.test_page import data_of, hostile


def before_and_after() -> tuple[Atlas, Atlas]:
    """Two kinds changed, one number by far the most, one head and one column on one side only."""
    before = decoder(4, 3)
    after = copy.deepcopy(before)
    kinds = after.heads["kind"].tolist()
    kinds[2], kinds[7] = "induction" if kinds[2] != "induction" else "sink", "broad"
    after.heads["kind"] = np.array(kinds)
    after.heads["induction_score"][2] += 0.5
    after.heads["entropy"][4] = np.nan
    del after.heads["qk_matching"]
    after.provenance |= {"model": "tuned", "weights_hash": "sha256:0"}
    return before, after


def test_numbers_are_after_minus_before(tmp_path: Path) -> None:
    before, after = before_and_after()
    data = data_of(compare(before.compare(after), tmp_path / "c.html"))
    assert data["title"] == "examples/synthetic-135M → tuned"
    shown = {column["name"]: column for column in data["columns"]}
    score = shown["induction_score"]
    assert score["label"] == "change of induction score"
    assert score["values"][2] == 0.5
    assert score["values"].count(0) == 11
    assert score["after"][2] == pytest.approx(score["before"][2] + 0.5, abs=1e-4)
    assert shown["entropy"]["values"][4] is None
    assert "qk_matching" not in shown
    assert data["metric"] == "induction_score"
    assert data["changes"]["largest"]["standard errors"][0]["row"] == 2
    assert [row for row, *_ in data["changes"]["kinds"]] == [
        row for row in (2, 7) if before.heads["kind"][row] != after.heads["kind"][row]
    ]
    assert any("qk_matching" in note for note in data["notes"])
    assert any("different models" in note for note in data["notes"])


def test_the_sentence_of_a_comparison() -> None:
    before, after = before_and_after()
    from headwise.report.changes import changes
    from headwise.report.payload import Detail

    said = changes(before.compare(after), Detail())["sentences"]
    count = sum(before.heads["kind"] != after.heads["kind"])
    assert said[0].startswith(f"{count} of 12 heads changed their kind: 1 from ")
    assert said[1].startswith("The largest change is the induction score of L0H2, from ")
    same = changes(before.compare(before), Detail())["sentences"]
    assert same == ["None of 12 heads changed their kind."]


@pytest.mark.parametrize("case", ["changed", "same", "hostile"])
def test_the_script_draws_a_comparison(tmp_path: Path, case: str) -> None:
    before, after = before_and_after()
    comparison: Comparison = {
        "changed": lambda: before.compare(after),
        "same": lambda: before.compare(before),
        "hostile": lambda: hostile().compare(hostile()),
    }[case]()
    found = driven(
        compare(comparison, tmp_path / "c.html"),
        tmp_path,
        """return {errors: page.document.documentElement.dataset.errors, cells: $$(".cell").length,
          changes: $("#changes").hidden, unused: $("#unused").hidden, scripts: $$("script").length,
          links: $$(".bar nav a:not([hidden])").map((a) => a.textContent),
          kinds: $$("#changed h3").map((h) => h.textContent)};""",
    )
    assert (found["errors"], found["cells"], found["scripts"]) == ("0", len(comparison), 3)
    assert (found["changes"], found["unused"]) == (False, True)
    assert "Changes" in found["links"]
    assert "Unused" not in found["links"]
    changed = len(comparison.changed_kinds())
    assert found["kinds"][0] == f"Kind: {changed} head{'s' * (changed != 1)} changed"
