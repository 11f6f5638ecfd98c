"""`headwise shrink` and `headwise generate`, from the arguments to the model and the page."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import headwise
from headwise.cli import main
from tests.cli import tiny
from tests.cli.command import refusal, spawn

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("offline_and_elsewhere")
QUICK = ("--rounds", "2", "--repeats", "1", "--tokens", "24", "--windows", "8")


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return tiny.gpt2(tmp_path / "tiny-gpt2")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return tiny.save(BertForMaskedLM(config), tmp_path / "tiny-bert")


def test_a_smaller_model_its_curve_and_its_page(llama: Path, text: Path, tmp_path: Path) -> None:
    """As a user does it, with nothing but the command, and then another to try it."""
    done = spawn("shrink", llama, "--keep", "params=0.9", "--text", text, "--out", "small", *QUICK,
                 cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Reached params=0.9" in done.stdout
    assert "try it: headwise generate small" in done.stdout
    there = {file.name for file in (tmp_path / "small").iterdir()}
    assert there == {"curve.json", "model", "report.html"}
    known: dict[str, Any] = json.loads((tmp_path / "small/curve.json").read_text("utf-8"))
    assert known["met"]
    model = headwise.load(tmp_path / "small" / "model")
    left = sum(p.numel() for p in model.parameters()) / known["original"]["params"]
    assert left == pytest.approx(known["points"][known["chosen"]]["left"]["params"])
    page = (tmp_path / "small" / "report.html").read_text("utf-8")
    assert "What it costs" in page
    assert "What is left of every layer" in page
    assert "headwise shrink" in page
    said = spawn("generate", "small", "--prompt", "A head", "--tokens", "4", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("A head")


def test_a_cache_that_was_found_is_used_to_generate(
    llama: Path, text: Path, capsys: Capture
) -> None:
    # 8 windows of 160 tokens are more than the text holds: it is read as it is, in fewer
    text.write_text(text.read_text() * 8)
    asked = ("--keep", "kv=0.5", "--text", text, "--out", "kv", "--tokens", "160", "--windows", "2")
    assert main([str(one) for one in ("shrink", llama, *asked, "--quiet")]) == 0
    assert "kv=0.5" in capsys.readouterr().out
    assert json.loads(Path("kv/curve.json").read_text("utf-8"))["cache"]
    assert main(["generate", "kv", "--prompt", "A head", "--tokens", "3"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("A head")
    assert "cache: " in told.err


def test_generate_takes_any_model_and_the_standard_input(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("A head"))
    assert main(["generate", str(llama), "--tokens", "3", "--temperature", "1", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("A head")


def test_a_bound_that_ends_the_search_is_said_and_is_the_exit_code(
    llama: Path, text: Path, capsys: Capture
) -> None:
    asked = ("--keep", "params=0.9", "--quality", "kl<=0.00000001", "--text", text, "--out", "no")
    code = main([str(one) for one in ("shrink", llama, *asked, *QUICK, "--quiet")])
    assert code == 1
    out = capsys.readouterr().out
    assert "Asked for params=0.9" in out
    assert "allows no further step" in out
    assert "refused" in Path("no/report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--keep", "params=0.001"), "leaves params=0."),
        (("--keep", "size=0.5"), "expected one of params, time, kv"),
        (("--keep", "params=2"), "at most 1"),
        (("--keep", "params=0.9", "--quality", "loss"), "no bound on quality"),
        (("--keep", "params=0.9", "--kinds", "tails"), "expected some of heads"),
        (("--keep", "params=0.9", "--windows", "1"), "2 or more"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    llama: Path, text: Path, asked: tuple[str, ...], said: str, capsys: Capture
) -> None:
    line = refusal(
        capsys, "shrink", llama, "--text", text, "--tokens", "24", "--out", "x", "--quiet", *asked
    )
    assert said in line


def test_a_folder_with_a_search_is_not_written_over(
    llama: Path, text: Path, capsys: Capture
) -> None:
    folder = Path("done")
    folder.mkdir()
    (folder / "curve.json").write_text("{}")
    line = refusal(capsys, "shrink", llama, "--keep", "params=0.9", "--text", text, "--out", folder)
    assert "--resume" in line
    assert "no curve" in refusal(
        capsys,
        "shrink",
        llama,
        "--keep",
        "params=0.9",
        "--text",
        text,
        "--out",
        folder,
        "--resume",
        "--quiet",
    )
    assert "holds no model" in refusal(capsys, "generate", folder, "--prompt", "A")
    assert "no folder" in refusal(capsys, "generate", "nowhere", "--prompt", "A")


def test_what_generate_says_is_what_the_model_says(
    llama: Path, text: Path, capsys: Capture
) -> None:
    from transformers import AutoTokenizer

    asked = ("--keep", "params=0.95", "--text", text, "--out", "small", *QUICK, "--quiet")
    assert main([str(one) for one in ("shrink", llama, *asked)]) == 0
    capsys.readouterr()
    assert main(["generate", "small", "--prompt", "A head", "--tokens", "5", "--quiet"]) == 0
    out = capsys.readouterr().out
    model = headwise.load("small/model")
    words = AutoTokenizer.from_pretrained("small/model")
    inputs = words("A head", return_tensors="pt")
    with torch.no_grad():
        found = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=5, do_sample=False,
        )  # fmt: skip
    assert out.strip() == words.decode(found[0], skip_special_tokens=True).strip()


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_where_an_unbroken_search_ends(
    llama: Path, text: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    from headwise.cli.progress import Progress

    def points(folder: str) -> Any:
        known = json.loads((Path(folder) / "curve.json").read_text("utf-8"))
        return [(p["took"], p["quality"], p["left"]["params"]) for p in known["points"]]

    asked = ["shrink", str(llama), "--keep", "params=0.8", "--text", str(text), *QUICK, "--out"]
    assert main([*asked, "whole", "--quiet"]) == 0
    capsys.readouterr()
    told = Progress.note

    def until(words: str) -> Any:
        def note(self: Progress, line: str) -> None:
            if line.startswith(words):
                raise KeyboardInterrupt
            told(self, line)

        return note

    monkeypatch.setattr(Progress, "note", until("measuring the original"))
    assert main([*asked, "cut"]) == 130
    assert "nothing was kept" in capsys.readouterr().err
    monkeypatch.setattr(Progress, "note", until("round 2"))
    assert main([*asked, "cut"]) == 130
    said = capsys.readouterr().err
    assert "pricing" in said
    assert "candidates priced" in said
    assert "interrupted; what was measured before is kept in cut. Go on with:" in said
    command = shlex.split(said.splitlines()[-1])
    assert command == ["headwise", *asked, "cut", "--resume"]
    monkeypatch.setattr(Progress, "note", told)
    assert main(command[1:]) == 0
    assert points("cut") == points("whole")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    llama: Path, text: Path, capsys: Capture
) -> None:
    Path("file").write_text("x")
    for out in ("file/sub", "/proc/nowhere"):
        line = refusal(capsys, "shrink", llama, "--keep", "params=0.9", "--text", text, "--out",
                       out, "--quiet")  # fmt: skip
        assert f"cannot write to {out}" in line
        assert "--out" in line


def test_two_budgets_are_one_too_many_and_a_refused_one_leaves_no_folder(
    llama: Path, text: Path, capsys: Capture
) -> None:
    asked = ("shrink", llama, "--text", text, "--tokens", "24", "--out", "x", "--quiet", "--keep")
    assert "2 budgets were given" in refusal(capsys, *asked, "params=0.9", "--keep", "kv=0.5")
    assert "leaves params=" in refusal(capsys, *asked, "params=0.001")
    assert not Path("x").exists()


def test_what_was_made_smaller_is_seen_and_made_smaller_again(
    llama: Path, text: Path, capsys: Capture
) -> None:
    """By the folder of the search, and by that of its model; layers are unequal in it."""
    more = ("--text", text, *QUICK, "--quiet")
    asked = ("shrink", llama, "--keep", "params=0.85", "--out", "one", *more)
    assert main([str(one) for one in asked]) == 0
    model = headwise.load("one/model")
    whole = sum(p.numel() for p in model.parameters())
    again = ("shrink", "one", "--keep", "params=0.9", "--out", "two", *more)
    assert main([str(one) for one in again]) == 0
    assert "one: Reached params=0.9" in capsys.readouterr().out
    smaller = headwise.load("two/model")
    assert sum(p.numel() for p in smaller.parameters()) <= 0.9 * whole
    for folder in ("one", "one/model"):
        place = f"seen-{folder.replace('/', '-')}"
        seen = ("see", folder, "--text", text, "--tokens", "24", "--quiet", "--out", place)
        assert main([str(one) for one in seen]) == 0
        assert capsys.readouterr().out.startswith("one: ")
    caused = ("cause", "one", "--text", text, "--tokens", "24", "--quiet", "--atlas", "seen-one")
    assert main([str(one) for one in caused]) == 0
    Path("two/model/headwise.json").write_text("{")
    assert "damaged" in refusal(capsys, *again[:1], "two", *again[2:5], "three", *more)


def test_more_tokens_than_positions_are_refused_and_the_usual_number_fits(
    gpt2: Path, text: Path, capsys: Capture
) -> None:
    asked = ("shrink", gpt2, "--text", text, "--out", "x", "--quiet", "--keep", "params=0.9")
    assert "positions for" in refusal(capsys, *asked, "--tokens", "100000")
    prompt = "A head " * 2000
    assert "positions for" in refusal(capsys, "generate", gpt2, "--prompt", prompt, "--quiet")


def test_an_encoder_is_made_smaller_and_asked_for_no_text(
    bert: Path, text: Path, capsys: Capture
) -> None:
    asked = ("shrink", bert, "--text", text, "--out", "x", *QUICK, "--quiet", "--keep")
    assert "no cache" in refusal(capsys, *asked, "kv=0.5")
    assert main([str(one) for one in (*asked, "params=0.9")]) == 0
    assert "headwise generate" not in capsys.readouterr().out
    assert "does not go on" in refusal(capsys, "generate", "x", "--prompt", "A head", "--quiet")
