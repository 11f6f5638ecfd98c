"""What every file of the catalog has to be, found by looking at the folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest
import torch

import headwise.papers
from headwise.papers import Entry, load
from headwise.papers.catalog import HERE, read
from tests.papers.catalogued import every_file, imported, readable

ROOMS = ("maps", "parts", "models", "edits", "instruments", "compress", "tasks", "train", "papers")
"""What a paper may use: the rooms below, and the catalog's own core."""
CORE = {"torch", "numpy", "safetensors", "rich"}
LIST = Path(__file__).resolve().parents[3] / "shared" / "papers.jsonl"

ISOLATED = """
import importlib, json, sys
import torch, headwise.papers, headwise.parts, headwise.maps
before = set(sys.modules)
found = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
        error = ""
    except Exception as wrong:
        error = f"{type(wrong).__name__}: {wrong}"
    new = set(sys.modules) - before
    found[name] = [error, sorted(m for m in new if m.startswith("headwise.papers."))]
    for module in new:  # the next file starts where this one did
        if module.startswith("headwise."):
            del sys.modules[module]
print(json.dumps(found))
"""


def module_of(file: Path) -> str:
    return f"headwise.papers.{file.parent.name}.{file.stem}"


@cache
def isolated() -> dict[str, tuple[str, list[str]]]:
    """What importing each file by itself raised and loaded of the catalog."""
    names = [module_of(parameter.values[0]) for parameter in every_file()]
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, json.dumps(names)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("file", every_file())
class TestEveryFile:
    def test_states_its_facts_and_claims(self, file: Path) -> None:
        entry = read(file)
        assert entry.claims, "it claims nothing"
        assert re.search(r"\d", entry.paper.source), "source= names no identifier"
        assert 1950 <= entry.paper.year <= 2030
        assert len(entry.about) > len(entry.paper.plain)
        assert entry.about.strip() != entry.paper.title
        assert "TODO" not in file.read_text("utf-8")
        assert (file.parent / "__init__.py").exists()
        assert len(file.read_text("utf-8").splitlines()) <= 300

    def test_imports_in_isolation(self, file: Path) -> None:
        error, loaded = isolated()[module_of(file)]
        assert not error
        core = {f"headwise.papers.{path.stem}" for path in HERE.glob("*.py")}
        own = {module_of(file), f"headwise.papers.{file.parent.name}"}
        assert set(loaded) <= core | own

    def test_uses_only_rooms_under_it_and_packages_it_names(self, file: Path) -> None:
        families = {path.name for path in HERE.iterdir() if path.is_dir()}
        needs = read(file).paper.needs
        for line, module in imported(file):
            where = f"{file.name}, line {line}: {module}"
            top, _, rest = module.partition(".")
            if top == "headwise":
                assert rest.split(".")[0] in ROOMS, f"{where} is of no room under papers"
                inner = rest.split(".")[1:2]
                assert not (rest.startswith("papers.") and inner and inner[0] in families), (
                    f"{where} is another paper; what papers share becomes a part"
                )
            else:
                assert top in CORE or top in sys.stdlib_module_names or top in needs, (
                    f"{where} is no package of the core; name it in needs="
                )

    def test_claims_stand_beside_controls(self, file: Path) -> None:
        paper = load(file.stem)
        assert paper.paper == paper.entry.paper, "what runs is not what was read"
        assert [claim.name for claim in paper.claims] == list(paper.entry.claims)
        assert [c.name for c in paper.claims if c.quick] == list(paper.entry.quick)
        for claim in paper.claims:
            subject = paper.contribution if claim.subject is None else claim.subject
            assert claim.control is not subject, f"{claim.name} is its own control"

    def test_names_parts_that_exist(self, file: Path) -> None:
        paper = load(file.stem)
        rooms = [import_module(f"headwise.{room}") for room in ROOMS]
        for name in paper.paper.parts:
            there = any(hasattr(room, name) for room in [*rooms, paper.module])
            assert there, f"parts= names {name!r}, which no room has"

    def test_the_lines_that_use_it_run(self, file: Path) -> None:
        entry = read(file)
        for package in entry.paper.needs:
            if util.find_spec(package) is None:
                pytest.skip(f"it needs {package}")
        names: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exec(compile(entry.paper.use, f"use of {entry.slug}", "exec"), names)
        assert len(names) > 1


def test_every_exported_name_of_the_catalog_exists() -> None:
    for name in headwise.papers.__all__:
        assert getattr(headwise.papers, name) is not None


def test_slugs_are_unique() -> None:
    slugs = [parameter.values[0].stem for parameter in every_file()]
    assert len(set(slugs)) == len(slugs)


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.slug) for e in readable()])
def test_agrees_with_the_reading_list(entry: Entry) -> None:
    if not LIST.exists():
        pytest.skip(f"the reading list is not at {LIST}")
    rows = {row["slug"]: row for row in map(json.loads, LIST.read_text("utf-8").splitlines())}
    assert entry.slug in rows, "no row of the reading list has this slug"
    assert entry.family == rows[entry.slug]["family"]


def test_a_file_that_states_too_little_is_refused(tmp_path: Path) -> None:
    whole = find_text("multi_query_attention")
    for old, new, says in (
        ('    title="Fast', '    title="" + "Fast', "literal"),
        ("    year=2019,\n", "    year=2019,\n    venue='x',\n", "takes no venue"),
        ('    source="arXiv 1911.02150",\n', '    source=" ",\n', "needs source"),
        ("@paper(", "@claim(", "marks 0 things"),
        ('"causal self", ', '"causal elf", ', "causal elf"),
        (whole.split('"""')[1], "", "no docstring"),
    ):
        assert old in whole
        file = tmp_path / "broken.py"
        file.write_text(whole.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(says)):
            read(file)


def find_text(slug: str) -> str:
    return headwise.papers.find(slug).path.read_text("utf-8")
