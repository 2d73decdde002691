"""The text that quality is measured on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from smolrun.errors import RequestError


def sample_text() -> str:
    """Some English, of about 3200 words: prose, dialogue, a table, lists and code."""
    return files("smolrun.measure").joinpath("english.txt").read_text(encoding="utf-8").rstrip("\n")


def text_of(path: Path | None) -> str:
    """A file's text without the newline at its end, or the sample. RequestError: not to be read."""
    if path is None:
        return sample_text()
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n")
