"""The README's Python runs as it stands, offline, one block after the other."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.models.default import default_model_path

    try:
        default_model_path()
    except FileNotFoundError:
        pytest.skip("the embedded model is not in this checkout")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "atlas.safetensors").is_file()


def test_commands_and_options_exist() -> None:
    """Every `headwise ...` line is one that the parser takes."""
    import shlex

    from headwise.cli.parser import build_parser

    parser = build_parser()
    # every second fence closes a block; what follows it is no block
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    plain = "".join(text for language, text in blocks if not language)
    lines = re.findall(r"^headwise (.*)$", plain, re.MULTILINE)
    assert len(lines) >= 15
    for line in lines:
        parser.parse_args(shlex.split(line.partition("#")[0]))


def test_linked_files_exist() -> None:
    """All but the picture, which is made with a model that is not in the checkout."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists() and "report.png" not in link]
    assert not missing
