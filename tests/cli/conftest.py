"""A clean machine, and one small real model, for the tests of the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.api.tiny import make_folder
from tests.cli.fakes import stdin_of


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SMOLRUN_") and name != "SMOLRUN_SHARED":
            monkeypatch.delenv(name)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "NO_COLOR", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("SMOLRUN_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdin", stdin_of(b""))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model can talk for long."""
    return make_folder(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=65536)


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    """A name that leads to a path, for models that are faked."""
    path = tmp_path / "fake.gguf"
    path.touch()
    return str(path)
