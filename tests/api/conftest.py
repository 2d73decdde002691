"""One small model for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun import Model

from .tiny import make_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[Model]:
    with Model(tiny_folder, threads=2) as model:
        yield model
