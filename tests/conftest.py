"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of golden data that is not part of the repository."""
    shared = Path(os.environ.get("SMOLRUN_SHARED", REPOSITORY.parent / "shared"))
    if not (shared / "data").is_dir():
        pytest.skip("the golden data is not here; set SMOLRUN_SHARED to its folder")
    return shared / "data"
