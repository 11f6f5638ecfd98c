"""The order of the rooms, and which room may know which library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "headwise"


def test_rooms_import_downwards_only() -> None:
    """The contract itself stands in pyproject.toml."""
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed; it comes with the test extra")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imported_at_module_level(path: Path) -> set[str]:
    """Top-level names of the modules that importing `path` imports, type checking left out."""
    found = set()
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("room", ["maps", "instruments", "report"])
def test_only_the_model_room_knows_transformers(room: str) -> None:
    """Maps are pure tensors; instruments and reports read what the model room hands up."""
    files = sorted((SOURCE / room).rglob("*.py"))
    assert files
    knowing = [
        str(path.relative_to(SOURCE))
        for path in files
        if "transformers" in imported_at_module_level(path)
    ]
    assert knowing == []


@pytest.mark.parametrize("room", ["cli"])
def test_the_command_line_imports_nothing_heavy_at_module_level(room: str) -> None:
    heavy = {"torch", "transformers", "numpy", "pandas", "rich"}
    loading = {
        str(path.relative_to(SOURCE)): sorted(imported_at_module_level(path) & heavy)
        for path in (SOURCE / room).rglob("*.py")
        if path.name in {"__init__.py", "__main__.py", "dispatch.py", "parser.py", "options.py"}
    }
    assert not any(loading.values()), loading
