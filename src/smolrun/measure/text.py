"""The text that quality is measured on."""

from __future__ import annotations

from importlib.resources import files

from smolrun.errors import RequestError
from smolrun.files.checkpoint import Checkpoint
from smolrun.text.tokenizer import Tokenizer


def sample_text() -> str:
    """Some English, of about 3200 words: prose, dialogue, a table, lists and code."""
    return files("smolrun.measure").joinpath("english.txt").read_text(encoding="utf-8").rstrip("\n")


def tokens_of(text: str, checkpoint: Checkpoint) -> list[int]:
    """The tokens of a text, in a model's vocabulary; RequestError where it has no tokenizer."""
    if checkpoint.tokenizer is None:
        raise RequestError(f"{checkpoint.path}: has no tokenizer, so it can not read a text")
    tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
    return tokenizer.encode(text, parse_special=False)
