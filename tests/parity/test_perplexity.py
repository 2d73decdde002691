"""Perplexity of the real model beside llama.cpp's, over the same windows of the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smolrun import Model
from smolrun.measure.text import sample_text
from tests.parity.test_real_model import llama_cpp_logits, log_softmax

pytestmark = pytest.mark.parity


def test_perplexity_beside_llama_cpp(real_model: Path) -> None:
    """Windows of 512, of each of which the tokens from place 257 on count."""
    with Model(real_model) as model:
        ids = model.tokenize(sample_text(), parse_special=False)
        found = model.perplexity(sample_text())
    logprobs: list[float] = []
    for start in range(0, len(ids) - 511, 512):
        window = ids[start : start + 512]
        rows = log_softmax(llama_cpp_logits(real_model, window))
        logprobs += [float(rows[place - 1, window[place]]) for place in range(257, 512)]
    assert found.tokens == len(logprobs)
    assert found.value == pytest.approx(np.exp(-np.mean(logprobs)), rel=0.005)
