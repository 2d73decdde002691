"""The native engine against transformers on random models of every shape that we say we run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun import Model
from smolrun.model.config import ModelConfig
from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.models import (
    configs,
    nmse,
    save_folder,
    transformers_logits,
    transformers_model,
    values_of,
)

pytestmark = pytest.mark.parity

# docs/architecture.md, the numeric contract.
BOUND = {WeightType.F32: 1e-6, WeightType.F16: 2e-6, WeightType.BF16: 5e-5}


@given(
    config=configs(),
    weight_type=st.sampled_from(list(BOUND)),
    seed=st.integers(0, 2**32),
    length=st.integers(1, 60),
)
@settings(max_examples=60)
def test_logits(config: ModelConfig, weight_type: WeightType, seed: int, length: int) -> None:
    tensors = random_weights(config, seed, weight_type)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length))
    expected = transformers_logits(transformers_model(config, values_of(tensors)), ids)
    with tempfile.TemporaryDirectory() as name:
        folder = save_folder(config, tensors, Path(name))
        with Model(folder) as model:
            assert model.config == config
            whole = model.forward(ids, all_positions=True)
            model.clear_kv_cache()
            last = model.forward(ids[:, : length // 2 + 1])
            if length // 2 + 1 < length:
                last = model.forward(ids[:, length // 2 + 1 :], start_pos=length // 2 + 1)
    assert nmse(whole, expected) <= BOUND[weight_type]
    assert (last[:, 0] == whole[:, -1]).all()


@given(config=configs(), seed=st.integers(0, 2**32), length=st.integers(1, 60))
@settings(max_examples=10)
def test_embeddings(config: ModelConfig, seed: int, length: int) -> None:
    """The mean of the last hidden state, of length 1, as sentence embeddings are made of it."""
    import torch

    tensors = random_weights(config, seed, WeightType.F32)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length))
    with torch.no_grad():
        states = transformers_model(config, values_of(tensors)).model(torch.tensor(ids))
        mean = states.last_hidden_state.mean(dim=1)
        expected = torch.nn.functional.normalize(mean, dim=1).numpy()
    with tempfile.TemporaryDirectory() as name:
        folder = save_folder(config, tensors, Path(name))
        with Model(folder) as model:
            assert nmse(model.embed(ids.tolist()), expected) <= BOUND[WeightType.F32]
