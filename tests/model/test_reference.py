"""The reference reading against formulas written down another way, and its cache against itself."""

from __future__ import annotations

import cmath
import math

import numpy as np
import numpy.typing as npt
import pytest

from smolrun.model.config import ModelConfig, RopeScaling
from smolrun.model.llama import build
from smolrun.model.random import random_weights, zero_weights
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.types import WeightType
from tests.models import Values, nmse, small_config, values_of

Vector = npt.NDArray[np.float64]

SHAPES = [
    small_config(),
    small_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    small_config(num_attention_heads=3, num_key_value_heads=1, no_rope_layers=(0, 1, 0, 1)),
    small_config(rope_scaling=RopeScaling("yarn", 4.0, 32), model_type="smollm3"),
    small_config(rope_scaling=RopeScaling("linear", 3.9), model_type="llama"),
]


def runner(
    config: ModelConfig,
    seed: int = 0,
    *,
    dtype: npt.DTypeLike = np.float64,
    rounded_kv: bool = False,
) -> ReferenceRunner:
    values = values_of(random_weights(config, seed))
    return ReferenceRunner(build(config), values, dtype=dtype, rounded_kv=rounded_kv)


def spelled_out(config: ModelConfig, weights: Values, ids: list[int]) -> Vector:
    """Logits of the last of `ids`: one token and one head at a time, RoPE as complex numbers."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    frequencies, magnitude = config.rope_parameters()
    half, heads, kv_heads = (
        config.head_dim // 2,
        config.num_attention_heads,
        config.num_key_value_heads,
    )

    def norm(x: Vector, name: str) -> Vector:
        size = math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + config.rms_norm_eps)
        return x / size * w[name]

    def linear(x: Vector, name: str) -> Vector:
        out: Vector = np.array([np.sum(row * x) for row in w[f"{name}.weight"]])
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def turned(head: Vector, position: int) -> Vector:
        angles = [float(np.float32(position) * frequency) for frequency in frequencies]
        pairs = [
            complex(head[i], head[i + half]) * magnitude * cmath.exp(1j * angles[i])
            for i in range(half)
        ]
        return np.array([pair.real for pair in pairs] + [pair.imag for pair in pairs])

    hidden = [w["model.embed_tokens.weight"][token] for token in ids]
    for layer, rope in enumerate(config.no_rope_layers):
        at = f"model.layers.{layer}"
        normed = [norm(x, f"{at}.input_layernorm.weight") for x in hidden]
        q, k, v = (
            [linear(x, f"{at}.self_attn.{part}_proj").reshape(-1, config.head_dim) for x in normed]
            for part in "qkv"
        )
        if rope:
            q = [np.array([turned(head, t) for head in heads_]) for t, heads_ in enumerate(q)]
            k = [np.array([turned(head, t) for head in heads_]) for t, heads_ in enumerate(k)]
        for t in range(len(ids)):
            mixed = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                scores = [
                    math.exp(float(q[t][head] @ k[s][kv]) / math.sqrt(config.head_dim))
                    for s in range(t + 1)
                ]
                mixed.append(sum(scores[s] * v[s][kv] for s in range(t + 1)) / sum(scores))
            hidden[t] = hidden[t] + linear(np.concatenate(mixed), f"{at}.self_attn.o_proj")
            x = norm(hidden[t], f"{at}.post_attention_layernorm.weight")
            gate, up = linear(x, f"{at}.mlp.gate_proj"), linear(x, f"{at}.mlp.up_proj")
            gated = np.array([g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
            hidden[t] = hidden[t] + linear(gated, f"{at}.mlp.down_proj")
    last = norm(hidden[-1], "model.norm.weight")
    head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    out: Vector = w[head_name] @ last
    return out


@pytest.mark.parametrize("config", SHAPES, ids=range(len(SHAPES)))
def test_it_computes_what_the_formulas_say(config: ModelConfig) -> None:
    ids = [5, 17, 3, 95, 0, 17, 44]
    reference = runner(config)
    expected = spelled_out(config, values_of(random_weights(config)), ids)
    assert nmse(reference.forward([ids])[0, -1], expected) <= 1e-25
    reference = runner(config, dtype=np.float32)
    assert nmse(reference.forward([ids])[0, -1], expected) <= 1e-11


def test_a_wrong_nope_pattern_or_magnitude_is_seen() -> None:
    ids = [5, 17, 3, 95, 0, 17, 44]
    config = small_config()
    weights = values_of(random_weights(config))
    expected = spelled_out(config, weights, ids)
    for other in (
        small_config(no_rope_layers=(1, 1, 1, 1)),
        small_config(rope_scaling=RopeScaling("yarn", 1.0, 128, attention_factor=1.05)),
    ):
        found = ReferenceRunner(build(other), weights).forward([ids])[0, -1]
        assert nmse(found, expected) > 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_cutting_a_prompt_and_mixing_sequences_changes_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    config = small_config()
    texts = [random.integers(0, 96, random.integers(1, 20)).tolist() for _ in range(4)]
    alone = [runner(config).forward([text])[0] for text in texts]
    mixed = runner(config)
    done = [0] * len(texts)
    while any(done[s] < len(text) for s, text in enumerate(texts)):
        rows: list[tuple[int, int]] = []  # (sequence, position)
        for s, text in enumerate(texts):
            count = int(random.integers(0, len(text) - done[s], endpoint=True))
            rows += [(s, position) for position in range(done[s], done[s] + count)]
            done[s] += count
        if not rows:
            continue
        wanted = random.integers(0, len(rows), 3)
        found = mixed.step(
            [texts[s][p] for s, p in rows], [p for _, p in rows], [s for s, _ in rows], wanted
        )
        assert found.shape == (3, 96)
        for row, logits in zip(wanted, found, strict=True):
            sequence, position = rows[row]
            assert nmse(logits, alone[sequence][position]) <= 1e-25


def test_forward_takes_batches_and_a_start() -> None:
    config = small_config()
    ids = np.arange(24).reshape(2, 12)
    whole = runner(config).forward(ids)
    assert whole.shape == (2, 12, 96)
    parts = runner(config)
    first, second = parts.forward(ids[:, :5]), parts.forward(ids[:, 5:], start_pos=5)
    assert nmse(np.concatenate((first, second), axis=1), whole) <= 1e-25
    # Going back writes over what was cached.
    assert nmse(parts.forward(ids[:, 3:], start_pos=3), whole[:, 3:]) <= 1e-25
    parts.clear()
    with pytest.raises(ValueError, match="tokens cached"):
        parts.forward(ids, start_pos=1)


def test_more_queries_than_attend_at_a_time() -> None:
    config = small_config(max_position_embeddings=1024)
    ids = (np.arange(300) * 7 % 96)[None]
    whole = runner(config).forward(ids)
    parts = runner(config)
    pieces = [parts.forward(ids[:, i : i + 100], start_pos=i) for i in (0, 100, 200)]
    assert nmse(np.concatenate(pieces, axis=1), whole) <= 1e-25


def test_the_cache_may_be_rounded() -> None:
    ids = [list(range(20))]
    exact = runner(small_config()).forward(ids)
    rounded = runner(small_config(), rounded_kv=True).forward(ids)
    assert 1e-10 < nmse(rounded, exact) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "positions", "sequences"),
    [([96], [0], [0]), ([-1], [0], [0]), ([1, 2], [0, 2], [0, 0]), ([1], [1], [0]), ([1], [], [0])],
)
def test_steps_that_make_no_sense_are_refused(
    tokens: list[int], positions: list[int], sequences: list[int]
) -> None:
    with pytest.raises(ValueError, match="token|position"):
        runner(small_config()).step(tokens, positions, sequences)


def test_random_models_are_not_degenerate() -> None:
    """Logits vary, and they depend on tokens far back, in every float type."""
    for dtype in (WeightType.F32, WeightType.F16, WeightType.BF16):
        for hidden_size in (32, 256):
            config = small_config(hidden_size=hidden_size, vocab_size=1000, num_hidden_layers=8)
            weights = values_of(random_weights(config, 1, dtype))
            ids = np.arange(0, 320, 10)[None]
            logits = ReferenceRunner(build(config), weights).forward(ids)[0]
            assert 1.0 < logits.std() < 4.0
            assert np.mean(logits.argmax(axis=-1) == ids[0]) < 0.2
            changed = ids.copy()
            changed[0, 0] = 999
            other = ReferenceRunner(build(config), weights).forward(changed)[0, -1]
            assert nmse(other, logits[-1]) > 1e-5


def test_zero_weights_give_zero_logits() -> None:
    config = small_config()
    logits = ReferenceRunner(build(config), values_of(zero_weights(config))).forward([[1, 2]])
    assert not logits.any()
