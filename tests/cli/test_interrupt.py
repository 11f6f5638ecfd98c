"""Ctrl-C keeps finished work and says how to go on; going on ends where an unbroken run ends."""

import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from headwise.cli import main
from headwise.instruments import Atlas
from tests.cli import tiny
from tests.cli.command import offline_environment, refusal, spawn

TEXTS = 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("models") / "tiny-llama", layers=4)


@pytest.fixture
def words(llama: Path, tmp_path: Path) -> list[str]:
    """A command whose samples take long enough to be interrupted between them."""
    for number in range(TEXTS):
        line = f"text number {number} says what text number {number + 1} says next. "
        (tmp_path / f"{number}.txt").write_text(line * 20, encoding="utf-8")
    names = [f"{number}.txt" for number in range(TEXTS)]
    return ["see", str(llama), "--text", *names, "--tokens", "512", "--out", "broken"]


def interrupted(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command and send it what Ctrl-C sends, once two samples are finished."""
    running = subprocess.Popen(
        [sys.executable, "-m", "headwise.cli", *words],
        cwd=cwd,
        env=offline_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that was started in the background hands down that Ctrl-C is to be ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    finished = cwd / "broken" / "partial"
    while running.poll() is None and len(list(finished.glob("*.safetensors"))) < 2:
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    return subprocess.CompletedProcess(words, running.returncode, out, err)


def same(one: Atlas, other: Atlas) -> bool:
    """Bit for bit, all that is not about the run itself."""
    for table in ("heads", "layers", "pairs", "spread"):
        mine, theirs = getattr(one, table), getattr(other, table)
        if mine.keys() != theirs.keys():
            return False
        for name, values in mine.items():
            nan = values.dtype.kind == "f"
            if not np.array_equal(values, theirs[name], equal_nan=nan):
                return False
    tiles = zip(one.tiles, other.tiles, strict=True)
    return one.reasons == other.reasons and all(
        np.array_equal(a["weights"], b["weights"]) and a["tokens"] == b["tokens"] for a, b in tiles
    )


def test_an_interrupted_run_goes_on_and_ends_the_same(words: list[str], tmp_path: Path) -> None:
    broken = interrupted(words, tmp_path)
    assert broken.returncode == 130, broken.stderr
    assert "Traceback" not in broken.stderr
    assert "interrupted" in broken.stderr
    assert not (tmp_path / "broken" / "atlas.safetensors").exists()
    kept = len(list((tmp_path / "broken" / "partial").glob("*.safetensors")))
    assert kept >= 2

    # The last line is the command that goes on, as it stands.
    program, *again = shlex.split(broken.stderr.splitlines()[-1])
    assert program == "headwise"
    assert again == [*words, "--resume"]
    resumed = spawn(*again, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    first_step = next(line for line in resumed.stderr.splitlines() if line[0].isdigit())
    assert int(first_step.split("/")[0]) > 4 * 2, "finished samples were measured again"

    unbroken = spawn(*words[:-1], "unbroken", cwd=tmp_path)
    assert unbroken.returncode == 0, unbroken.stderr
    one, other = Atlas.load(tmp_path / "broken"), Atlas.load(tmp_path / "unbroken")
    assert same(one, other)
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {
        "atlas.safetensors",
        "report.html",
    }


@pytest.fixture
def unfinished(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same, interrupted in this process: at the fifth step of the progress."""
    from headwise.cli.progress import Progress

    def step(self: Progress, done: int, total: int, what: str) -> None:
        if done > 5:
            raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    quick = [*words, "--instruments", "shape"]
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "step", step)
        assert main(quick) == 130
    return quick


def test_an_unfinished_run_is_not_overwritten_silently(
    unfinished: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, *unfinished)
    assert "an unfinished run" in line
    assert "--resume" in line
    assert "--force" in line


def test_runs_are_not_mixed(unfinished: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, *unfinished, "--quiet", "--resume", "--tokens", "256")
    assert "another run" in line


def test_a_finished_run_has_nothing_to_resume(
    unfinished: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told again; the report is written again if it is missing."""
    assert main([*unfinished, "--resume"]) == 0
    before = (tmp_path / "broken" / "atlas.safetensors").read_bytes()
    (tmp_path / "broken" / "report.html").unlink()
    assert main([*unfinished, "--resume"]) == 0
    assert (tmp_path / "broken" / "atlas.safetensors").read_bytes() == before
    assert (tmp_path / "broken" / "report.html").is_file()
    line = refusal(capsys, *unfinished, "--resume", "--seed", "7")
    assert "another command" in line
