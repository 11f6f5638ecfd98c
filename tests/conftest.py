"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of small real weights and data; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
    folder = Path(os.environ.get("HEADWISE_ASSETS", default))
    if not folder.is_dir():
        pytest.skip(f"real weights are not at {folder}; set HEADWISE_ASSETS to their folder")
    return folder
