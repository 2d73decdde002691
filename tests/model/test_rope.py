"""Inverse frequencies against the formulas, and against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings

from smolrun.model.config import ModelConfig
from smolrun.model.presets import preset
from tests.models import configs, hugging_face_values


def test_default_frequencies() -> None:
    config = preset("SmolLM2-135M")
    frequencies, factor = config.rope_parameters()
    expected = [1.0 / 100_000 ** (2 * pair / 64) for pair in range(32)]
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=2e-7)
    assert factor == 1.0


@pytest.mark.parametrize(("context", "factor"), [(131072, 1.0693147), (262144, 1.1386294)])
def test_yarn_of_smollm3(context: int, factor: float) -> None:
    """The bounds 24 and 39 and the magnitudes are known from two other implementations."""
    config = preset("SmolLM3-3B")
    stretch = context / 65536
    plain, _ = config.rope_parameters()
    stretched, magnitude = config.with_context(context).rope_parameters()
    assert magnitude == pytest.approx(factor, rel=1e-7)
    np.testing.assert_array_equal(stretched[:25], plain[:25])
    np.testing.assert_allclose(stretched[39:], plain[39:] / stretch, rtol=2e-7)
    for pair in range(25, 39):
        share = (pair - 24) / (39 - 24)
        expected = plain[pair] * (1 - share) + plain[pair] / stretch * share
        assert math.isclose(stretched[pair], expected, rel_tol=1e-6)


@pytest.mark.parity
@settings(max_examples=300)
@given(config=configs())
def test_rope_parameters_of_transformers(config: ModelConfig) -> None:
    from transformers import LlamaConfig, SmolLM3Config
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = hugging_face_values(config)
    del values["model_type"]
    kind = LlamaConfig if config.model_type == "llama" else SmolLM3Config
    rotary = LlamaRotaryEmbedding(kind(**values))
    frequencies, factor = config.rope_parameters()
    # torch's float32 power may differ in its last place, and what follows from it in one more.
    np.testing.assert_array_max_ulp(frequencies, rotary.inv_freq.numpy(), maxulp=2)
    assert factor == rotary.attention_scaling
