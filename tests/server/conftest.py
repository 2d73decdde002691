"""One small model and one server for the tests of this room."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun import Model
from smolrun.server.service import Settings
from tests.api.tiny import make_folder

from .running import Running


@pytest.fixture(autouse=True)
def same_loggers() -> Iterator[None]:
    """What a test's `smolrun serve` makes of the loggers goes with it."""
    loggers = [logging.getLogger(name) for name in ("smolrun", "smolrun.server", "uvicorn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return make_folder(root / "tiny", max_position_embeddings=2048)


@pytest.fixture(scope="session")
def model(folder: Path) -> Iterator[Model]:
    with Model(folder, threads=1, max_sequences=4) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with Running(model, Settings(names=("tiny",))) as running:
        yield running


@pytest.fixture
def healthy(server: Running) -> Iterator[Running]:
    """The server, which must be well after the test too."""
    yield server
    server.check_health()
