"""Running the command line: in this process where that is enough, else as a real command."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from headwise.cli import main
from headwise.instruments import Atlas


def offline_environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def spawn(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, offline."""
    return subprocess.run(
        [sys.executable, "-m", "headwise.cli", *map(str, arguments)],
        cwd=cwd,
        env=offline_environment(),
        capture_output=True,
        text=True,
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that refuses these arguments, with the exit code of wrong input."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"headwise {arguments[0]}: error: ")
    assert "Traceback" not in line
    return line


def handmade_atlas(**changes: list[float]) -> Atlas:
    """Two layers of two heads with a few columns."""
    heads: dict[str, object] = {
        "layer": [0, 0, 1, 1],
        "head": [0, 1, 0, 1],
        "kind": ["sink", "previous-token", "induction", "sink"],
        "sink_mass": [0.9, 0.1, np.nan, 0.8],
        "previous_token_score": [0.0, 0.97, 0.1, 0.02],
        "induction_score": [0.0, 0.01, 0.83, 0.0],
    }
    heads |= changes
    return Atlas(
        heads={name: np.array(values) for name, values in heads.items()},
        layers={"layer": np.array([0, 1]), "residual_norm": np.array([1.0, 2.5])},
        provenance={"model": "handmade", "texts": [{"name": "t", "sha256": "0", "tokens": 12}]},
    )
