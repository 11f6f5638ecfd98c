"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples in every run, so that a red build is the change's doing; to look for new ones:
# HYPOTHESIS_PROFILE=explore make test
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of small real weights and data; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
    folder = Path(os.environ.get("HEADWISE_ASSETS", default))
    if not folder.is_dir():
        pytest.skip(f"real weights are not at {folder}; set HEADWISE_ASSETS to their folder")
    return folder
