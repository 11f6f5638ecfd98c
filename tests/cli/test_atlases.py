"""show, compare and report on atlases made by hand."""

import csv
import io
import json
from pathlib import Path

import pytest

from headwise.cli import main
from tests.cli.command import handmade_atlas, refusal

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    handmade_atlas().save(tmp_path / "run" / "atlas.safetensors")
    return tmp_path / "run"


def shown(capsys: Capture, *arguments: object) -> str:
    assert main([str(word) for word in arguments]) == 0
    return capsys.readouterr().out


def test_show_prints_a_line_a_head(folder: Path, capsys: Capture) -> None:
    lines = shown(capsys, "show", folder).splitlines()
    assert "handmade" in lines[0]
    assert "4 heads" in lines[0]
    assert lines[1].split()[:4] == ["layer", "head", "kind", "sink_mass"]
    assert lines[5].split() == ["1", "0", "induction", "-", "0.100", "0.830"]
    assert len(lines) == 7


def test_show_as_json_keeps_every_column_and_says_null_for_not_measured(
    folder: Path, capsys: Capture
) -> None:
    heads = json.loads(shown(capsys, "show", folder / "atlas.safetensors", "--json"))
    assert [head["layer"] for head in heads] == [0, 0, 1, 1]
    assert heads[2]["sink_mass"] is None
    assert heads[1]["previous_token_score"] == 0.97


def test_show_as_csv(folder: Path, capsys: Capture) -> None:
    rows = list(csv.DictReader(io.StringIO(shown(capsys, "show", folder, "--csv"))))
    assert rows[2]["kind"] == "induction"
    assert rows[2]["sink_mass"] == ""
    assert float(rows[0]["sink_mass"]) == 0.9


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (["--sort", "sink_mass"], [(0, 0), (1, 1), (0, 1), (1, 0)]),
        (["--sort", "sink_mass", "--ascending"], [(0, 1), (1, 1), (0, 0), (1, 0)]),
        (["--sort", "sink_mass", "--kind", "sink", "--rows", "1"], [(0, 0)]),
        (["--kind", "sink"], [(0, 0), (1, 1)]),
    ],
)
def test_show_sorts_and_selects(
    folder: Path, capsys: Capture, arguments: list[str], order: list[tuple[int, int]]
) -> None:
    """What was not measured comes last whichever way it is sorted."""
    heads = json.loads(shown(capsys, "show", folder, "--json", *arguments))
    assert [(head["layer"], head["head"]) for head in heads] == order


def test_show_layers(folder: Path, capsys: Capture) -> None:
    layers = json.loads(shown(capsys, "show", folder, "--layers", "--json"))
    assert layers == [
        {"layer": 0, "residual_norm": 1.0},
        {"layer": 1, "residual_norm": 2.5},
    ]


def test_unknown_names_are_refused_with_the_nearest(folder: Path, capsys: Capture) -> None:
    line = refusal(capsys, "show", folder, "--sort", "induction_scor")
    assert "'induction_score'" in line
    line = refusal(capsys, "show", folder, "--columns", "layer,sink_mas")
    assert "'sink_mass'" in line
    assert "'induction'" in refusal(capsys, "show", folder, "--kind", "inductoin")


def test_no_atlas(tmp_path: Path, capsys: Capture) -> None:
    assert "no atlas at" in refusal(capsys, "show", tmp_path / "none")
    assert "no atlas at" in refusal(capsys, "report", tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not an atlas")
    assert "broken.safetensors" in refusal(capsys, "show", broken)


def test_compare_says_what_changed(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    other = handmade_atlas(induction_score=[0.0, 0.01, 0.2, 0.0])
    other.save(tmp_path / "other.safetensors")
    text = shown(capsys, "compare", folder, tmp_path / "other.safetensors")
    assert "L1H0" in text
    assert "-0.630" in text


def test_compare_as_json_and_page(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    other = handmade_atlas(induction_score=[0.0, 0.01, 0.2, 0.0])
    other.provenance["model"] = "<b>other</b>"
    other.save(tmp_path / "other.safetensors")
    page = tmp_path / "new" / "changes.html"
    out = shown(capsys, "compare", folder, tmp_path / "other.safetensors", "--json", "--html", page)
    heads = json.loads(out)["heads"]
    assert heads[2]["induction_score_change"] == pytest.approx(-0.63)
    assert heads[2]["sink_mass_change"] is None
    html = page.read_text(encoding="utf-8")
    assert "L1H0" in html
    assert "<b>other" not in html
    assert [path.name for path in page.parent.iterdir()] == ["changes.html"]


def test_atlases_that_share_no_head_are_refused(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = handmade_atlas(layer=[7, 7, 8, 8])
    other.save(tmp_path / "other.safetensors")
    assert "share no head" in refusal(capsys, "compare", folder, tmp_path / "other.safetensors")


def test_report_is_written_beside_the_atlas(folder: Path, capsys: Capture) -> None:
    assert shown(capsys, "report", folder).strip() == str(folder / "report.html")
    assert (folder / "report.html").stat().st_size > 1000
