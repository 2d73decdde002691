"""The text that quality is measured on."""

from __future__ import annotations

from importlib.resources import files


def sample_text() -> str:
    """Some English, of about 3200 words: prose, dialogue, a table, lists and code."""
    return files("smolrun.measure").joinpath("english.txt").read_text(encoding="utf-8").rstrip("\n")
