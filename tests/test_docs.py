"""Pages that are written from the code say what the code says."""

import re
from pathlib import Path
from typing import Any

import pytest

from recipes import parts_page

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_page_of_parts_is_up_to_date() -> None:
    have = parts_page.PAGE.read_text(encoding="utf-8")
    assert have == parts_page.page(), "run: python -m recipes.parts_page"


def test_the_code_on_the_page_of_weights_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.models.default import default_model_path

    try:
        default_model_path()
    except FileNotFoundError:
        pytest.skip("the embedded model is not in this checkout")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (DOCS / "weights.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "weights.md", "exec"), names)
    assert names["scores"].top(1, "k")[0].score > 2 * names["scores"].random


def test_the_code_on_the_page_of_shrinking_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (DOCS / "shrink.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "shrink.md", "exec"), names)
    assert names["curve"].met
    assert (tmp_path / "mine" / "headwise.json").is_file()
    assert names["cached"].tokens > 0.3


@pytest.mark.parametrize("page", ["causes.md", "steering.md"])
def test_the_code_on_pages_about_known_circuits_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "steering.md":
        assert names["measured"].efficacy.change.mean < -1
        assert (tmp_path / "mine.safetensors").is_file()
