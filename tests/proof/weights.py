"""Where the weights and the loaders beside them are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def loader(path: Path) -> ModuleType:
    """The loader that lies beside the weights, as a module."""
    spec = importlib.util.spec_from_file_location(f"proof_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
