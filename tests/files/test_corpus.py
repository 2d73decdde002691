"""Every malformed file is refused with an error that says what is wrong, and costs little."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from smolrun.errors import ModelFormatError

from .corpus import cases
from .corpus_case import Case
from .images import PROMPT, tiny_gguf
from .loading import open_whole, run

CASES = cases()
MAX_GROWTH = 64 << 20  # bytes of memory


def test_the_corpus_is_large_and_its_cases_differ() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_seed_is_sound(tmp_path: Path) -> None:
    """Without this the corpus would prove nothing: the file that the cases break does run."""
    path = tmp_path / "good.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    checkpoint, tokenizer = open_whole(path)
    assert tokenizer is not None
    assert tokenizer.encode("<|im_start|>babc d") == [1, 4, 18, 19]
    assert np.isfinite(run(checkpoint, PROMPT)).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_file(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    before = _peak_memory()
    with pytest.raises(ModelFormatError) as caught:
        open_whole(path)
    message = str(caught.value)
    for word in case.mentions:
        assert word in message
    assert len(message) < 2000
    assert message.isprintable()
    assert _peak_memory() - before < MAX_GROWTH


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
