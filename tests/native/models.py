"""Small random models of every weight type, as the native runner and the reference take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun import _core
from smolrun.engine.native import BLOCK_TOKENS, Activations, build_runner
from smolrun.model.config import ModelConfig
from smolrun.model.llama import build
from smolrun.model.program import Program
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.blocks import dequantize
from smolrun.quant.types import WeightType
from tests.models import SCALE_OFFSETS

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def small_config(**changes: Any) -> ModelConfig:
    """Two layers, grouped heads, all widths multiples of 256 so that every type fits."""
    values: dict[str, Any] = {
        "model_type": "smollm3",
        "vocab_size": 300,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "no_rope_layers": [1, 0],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    values.update(changes)
    return ModelConfig.from_hugging_face(values, "test")


def random_blocks(
    random: np.random.Generator, weight_type: WeightType, rows: int, columns: int
) -> npt.NDArray[np.uint8]:
    """Bytes of a weight whose values have a deviation of about 1/sqrt(columns)."""
    if weight_type.is_float:
        values = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        stored: npt.NDArray[Any] = values
        if weight_type is WeightType.F16:
            stored = values.astype(np.float16)
        elif weight_type is WeightType.BF16:
            stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        return np.frombuffer(stored.tobytes(), dtype=np.uint8)
    count = rows * columns // weight_type.block_weights
    blocks = random.integers(0, 256, (count, weight_type.block_bytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[weight_type]:
        # With two scales, the second is what is subtracted or added: both signs even it out.
        scales = (0.5 + random.random(count)) * np.where(random.random(count) < 0.5, -1, 1)
        blocks[:, offset : offset + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    deviation = float(np.std(dequantize(blocks.reshape(-1), weight_type, columns)))
    for offset in SCALE_OFFSETS[weight_type]:
        scales = np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16)
        scales = (scales / (deviation * np.sqrt(columns))).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(-1)


@dataclass
class Model:
    """A model with random weights, for both readings."""

    config: ModelConfig
    program: Program
    native: dict[str, _core.Weight | Floats] = field(default_factory=dict)
    values: dict[str, Floats] = field(default_factory=dict)
    codes: dict[str, _core.Weight] = field(default_factory=dict)  # for fast activations

    @classmethod
    def random(cls, config: ModelConfig, types: Sequence[WeightType], seed: int = 0) -> Model:
        """Matrices take the types in turn."""
        random = np.random.default_rng(seed)
        model = cls(config, build(config))
        matrices = 0
        for name, shape in model.program.weights.items():
            if len(shape) == 1:
                values = (1 + 0.2 * random.standard_normal(shape)).astype(np.float32)
                model.native[name] = model.values[name] = values
                continue
            weight_type = types[matrices % len(types)]
            matrices += 1
            data = random_blocks(random, weight_type, *shape)
            model.native[name] = _core.Weight(weight_type.value, shape[0], shape[1], data)
            model.values[name] = dequantize(data, weight_type, shape[1])
            if weight_type in (WeightType.F16, WeightType.BF16):
                model.codes[name] = _core.Weight(
                    weight_type.value, shape[0], shape[1], data, as_codes=True
                )
        return model

    def runner(
        self,
        *,
        threads: int = 1,
        isa: str | None = None,
        activations: Activations = "exact",
        kv_blocks: int = 64,
        max_step_tokens: int = 256,
    ) -> _core.Runner:
        return build_runner(
            self.program,
            {**self.native, **(self.codes if activations == "fast" else {})},
            kv_blocks=kv_blocks,
            threads=threads,
            isa=isa,
            activations=activations,
            max_step_tokens=max_step_tokens,
        )

    def reference(self) -> ReferenceRunner:
        return ReferenceRunner(self.program, self.values, rounded_kv=True)


def ints(values: Any) -> Ints:
    return np.ascontiguousarray(values, dtype=np.int32)


def step(
    runner: _core.Runner,
    config: ModelConfig,
    tokens: Any,
    positions: Any,
    sequences: Any,
    tables: Any,
    rows: Any = None,
    hidden: Floats | None = None,
) -> Floats:
    """One step; logits of `rows`, by default of all tokens."""
    rows = ints(np.arange(len(tokens)) if rows is None else rows)
    logits = np.full((len(rows), config.vocab_size), np.nan, dtype=np.float32)
    runner.step(ints(tokens), ints(positions), ints(sequences), ints(tables), rows, logits, hidden)
    return logits


def run_sequence(
    runner: _core.Runner, config: ModelConfig, tokens: Ints, blocks: Ints, chunk: int
) -> Floats:
    """Logits of all tokens of one sequence, fed `chunk` at a time into `blocks`."""
    parts = []
    for begin in range(0, len(tokens), chunk):
        part = tokens[begin : begin + chunk]
        positions = np.arange(begin, begin + len(part))
        parts.append(step(runner, config, part, positions, np.zeros(len(part)), blocks[None, :]))
    return np.concatenate(parts)


def blocks_for(tokens: int, first: int = 0) -> Ints:
    return ints(np.arange(first, first + -(-tokens // BLOCK_TOKENS)))


def nmse(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Mean squared error, relative to the mean square of what is expected."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.sum(difference**2) / np.sum(expected.astype(np.float64) ** 2))
