"""kinds, instruments and explain: what headwise knows without a model."""

import json

import pytest

from headwise.cli import main
from tests.cli.command import refusal

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_kinds_print_every_rule_with_its_threshold(capsys: Capture) -> None:
    from headwise.instruments.kinds import KINDS, RULES, THRESHOLDS

    text = shown(capsys, "kinds")
    for kind in KINDS:
        assert kind in text
    for rule in RULES:
        for condition in rule.conditions:
            threshold = getattr(THRESHOLDS, condition.threshold)
            assert f"{condition.column} >= {threshold:.2f}" in text


def test_instruments_print_columns_units_and_sources(capsys: Capture) -> None:
    text = shown(capsys, "instruments")
    assert "induction_score" in text
    assert "arXiv 2209.11895" in text
    listed = json.loads(shown(capsys, "instruments", "--json"))
    columns = [column for columns in listed.values() for column in columns]
    assert all(column["unit"] and column["description"] for column in columns)


def test_explain_says_which_backend_and_why(capsys: Capture) -> None:
    text = shown(capsys, "explain", "--tokens", "512", "--heads", "4")
    assert "Causal()" in text
    assert "backend" in text
    assert "GFLOP" in text


def test_explain_takes_a_window_seriously(capsys: Capture) -> None:
    def work(*options: str) -> float:
        text = shown(capsys, "explain", "--tokens", "32768", *options)
        return float(text.partition("work")[2].split()[0])

    assert work("--window", "256", "--sinks", "4") < work() / 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--backend", "magic"], "'magic'"),
        (["--softcap", "30", "--backend", "flash"], "flash"),
        (["--heads", "8", "--kv-heads", "3"], "does not divide"),
        (["--queries", "65"], "more than --tokens"),
        (["--sinks", "4"], "without --window"),
        (["--full", "--window", "4"], "contradict"),
    ],
)
def test_explain_refuses_what_does_not_fit(options: list[str], says: str, capsys: Capture) -> None:
    assert says in refusal(capsys, "explain", "--tokens", "64", *options)
