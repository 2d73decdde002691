"""What a model becomes when it is loaded: from a configuration, in a context, within memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolrun import Model, RequestError, ResourceError, TemplateError
from smolrun.engine import load
from smolrun.engine.machine import Limit
from smolrun.model.llama import build
from smolrun.model.random import random_weights
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.types import WeightType
from tests.models import nmse, save_folder, small_config, values_of

from .tiny import VOCABULARY, make_folder


def test_a_model_from_a_configuration() -> None:
    config = small_config()
    with Model.from_config(config) as zeros:
        logits = zeros.forward([[1, 2, 3]], all_positions=True)
        assert logits.shape == (1, 3, 96)
        assert not logits.any()
    with Model.from_config(config, seed=4, weight_type=WeightType.BF16) as model:
        weights = values_of(random_weights(config, 4, WeightType.BF16))
        oracle = ReferenceRunner(build(config), weights, rounded_kv=True)
        ids = [[1, 2, 3, 4]]
        # Inputs are rounded to bfloat16 too, where the instruction set multiplies these.
        assert nmse(model.forward(ids, all_positions=True), oracle.forward(ids)) <= 5e-5
        result = model.generate([1, 2, 3], max_tokens=5, temperature=0, ignore_eos=True)
        assert len(result.token_ids) == 5
        assert result.text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            model.generate("x")
        with pytest.raises(TemplateError, match="no chat template"):
            model.chat("x")


def test_more_context_than_trained_turns_yarn_on(tiny_folder: Path, tmp_path: Path) -> None:
    with Model(tiny_folder, context_size=1024) as model:
        assert model.context_size == 1024
        assert model.config.rope_scaling.type == "yarn"
        assert model.config.rope_scaling.factor == 2.0
        assert "YaRN" in model.notes[0]
        assert "1024" in model.notes[0]
        assert len(model.generate([5] * 600, max_tokens=3, ignore_eos=True).token_ids) == 3
    with Model(tiny_folder, context_size=512) as model:
        assert model.config.rope_scaling.type == "default"
        assert model.notes == []
    config = small_config(model_type="llama", no_rope_layers=(1, 1, 1, 1))
    folder = save_folder(config, random_weights(config), tmp_path / "llama")
    with pytest.raises(RequestError, match="at most 128"):
        Model(folder, context_size=129)


def test_memory_is_a_limit(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(vocab_size=VOCABULARY)
    weights = sum(file.stat().st_size for file in tiny_folder.glob("*.safetensors"))
    headroom = 64 << 20

    def limited(kv_tokens: int) -> None:
        value = weights + headroom + kv_tokens * config.kv_bytes_per_token
        monkeypatch.setattr(load, "memory_available", lambda: Limit(value, "a test"))

    limited(300)
    with Model(tiny_folder) as model:
        assert model.context_size == 256
        assert "256 tokens" in model.notes[0]
        assert "a test" in model.notes[0]
    with pytest.raises(ResourceError, match=r"512 tokens.*a test.*weights.*largest.* 256 tokens"):
        Model(tiny_folder, context_size=512)
    limited(8 * 512)
    with Model(tiny_folder) as model:
        assert model.context_size == 512
        assert model.statistics()["kv_blocks"] <= 8 * 16
    monkeypatch.setattr(load, "memory_available", lambda: Limit(weights // 2, "a test"))
    with pytest.raises(ResourceError, match="the weights take"):
        Model(tiny_folder)


def test_the_default_context_is_bounded(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "long", max_position_embeddings=65536)
    with Model(folder) as model:
        assert model.context_size == load.DEFAULT_CONTEXT
        assert model.notes == []
        assert "65536" in model.loaded.kv_plan.why
