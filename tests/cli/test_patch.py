"""`headwise patch` from the arguments to the table, the numbers and the pictures, offline."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from headwise.cli import main
from headwise.instruments.metrics import LogitDifference
from headwise.instruments.patching import patch
from tests.cli import tiny
from tests.cli.command import refusal, spawn

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("offline_and_elsewhere")

PROMPTS = ["--clean", "Mary and John", "--corrupted", "Mary and Anna"]
ANSWERS = ["--answer", " M", "--wrong", " A"]


def made(*more: Any) -> dict[str, Any]:
    assert main([str(one) for one in ("patch", *more, "--quiet", "--out", "found")]) == 0
    found: dict[str, Any] = json.loads(Path("found/patch.json").read_text(encoding="utf-8"))
    return found


def test_a_pair_gives_a_table_numbers_and_a_picture(llama: Path, tmp_path: Path) -> None:
    """As a user does it, with nothing but the command."""
    done = spawn("patch", llama, *PROMPTS, "--answer", "J", "--wrong", "A", "--out", "found",
                 cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny-llama: 1 pair of prompts, logit difference" in done.stdout
    assert "layer  position" in done.stdout
    assert "patch.json, patch.svg in found" in done.stdout
    assert {p.name for p in (tmp_path / "found").iterdir()} == {"patch.json", "patch.svg"}
    told = json.loads((tmp_path / "found" / "patch.json").read_text(encoding="utf-8"))
    assert told["command"].startswith("headwise patch")
    words = [t.text for t in ElementTree.parse(tmp_path / "found" / "patch.svg").iter()]
    assert "J|A" in words  # the tokens in which the prompts differ


def test_the_numbers_are_those_of_the_function(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    told = made(llama, *PROMPTS, "--answer", "J", "--wrong", "A", "--site", "heads")
    words = tiny.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = [torch.tensor([words(text)["input_ids"]]) for text in PROMPTS[1::2]]
    right, wrong = (words(text)["input_ids"][0] for text in "JA")
    expected = patch(model, *ids, LogitDifference(right, wrong), "heads")
    np.testing.assert_allclose(told["values"], expected.values, atol=1e-5)
    assert list(told["axes"]) == ["layer", "head"]


def test_many_pairs_and_a_circuit(llama: Path, capsys: Capture) -> None:
    lines = [
        {"clean": a, "corrupted": b, "answer": "x", "wrong": "y"}
        for a, b in (("abcd", "abzz"), ("bcde", "bczz"), ("abcdef", "abzzzz"))
    ]
    Path("pairs.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    more = ["--prompts", "pairs.jsonl", "--positions", "end", "--direction", "noise"]
    told = made(llama, *more, "--circuit", "0.2")
    shown = capsys.readouterr().out
    assert "3 pairs of prompts" in shown
    assert "circuit: " in shown
    assert told["axes"]["position"] == ["end"]
    assert len(told["examples"]) == 3
    assert told["circuit"]["edges"]
    assert Path("found/circuit.svg").is_file()
    line = refusal(capsys, "patch", llama, *more, "--out", "found")
    assert "--force" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (PROMPTS, "--answer, --wrong missing"),
        ([*PROMPTS, *ANSWERS, "--prompts", "x"], "--prompts FILE holds the prompts"),
        (["--prompts", "nothing.jsonl"], "cannot read nothing.jsonl"),
        (["--clean", "ab", "--corrupted", "abc", *ANSWERS], "2 clean and 3 corrupted tokens"),
        ([*PROMPTS, "--answer", "", "--wrong", "x"], "has no tokens"),
        ([*PROMPTS, *ANSWERS, "--circuit", "-1"], "share above 0"),
        ([*PROMPTS, *ANSWERS, "--out", "text.txt"], "is a file"),
    ],
)
def test_what_cannot_be_done_is_said(
    llama: Path, text: Path, capsys: Capture, arguments: list[str], says: str
) -> None:
    assert says in refusal(capsys, "patch", llama, *arguments, "--quiet")


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no prompts"), ("{]", "line 1: no JSON"), ('\n{"clean": "a"}', "line 2: expected")],
)
def test_files_that_hold_no_pairs(llama: Path, capsys: Capture, content: str, says: str) -> None:
    Path("pairs.jsonl").write_text(content, encoding="utf-8")
    assert says in refusal(capsys, "patch", llama, "--prompts", "pairs.jsonl")
