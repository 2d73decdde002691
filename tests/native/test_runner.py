"""The native reading against the reference, and the promise of equal bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun import _core
from smolrun.engine.native import BLOCK_TOKENS, Activations
from smolrun.model.config import ModelConfig
from smolrun.quant.types import WeightType
from tests.native.models import (
    Model,
    blocks_for,
    ints,
    nmse,
    random_blocks,
    run_sequence,
    small_config,
    step,
)

FLOATS = (WeightType.F32, WeightType.F16, WeightType.BF16)
# As in a "Q4_K_M" of the small models: many types in one file.
MIX = (WeightType.Q4_K, WeightType.Q5_0, WeightType.Q8_0, WeightType.Q6_K, WeightType.F32)


def bound(*types: WeightType) -> float:
    """What docs/architecture.md promises."""
    return 5e-5 if WeightType.BF16 in types else 1e-6


def random_tokens(config: ModelConfig, count: int, seed: int = 1) -> Any:
    return ints(np.random.default_rng(seed).integers(0, config.vocab_size, count))


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("weight_type", WeightType)
def test_every_type_agrees_with_the_reference(weight_type: WeightType, isa: str) -> None:
    config = small_config()
    model = Model.random(config, [weight_type])
    tokens = random_tokens(config, 70)
    expected = model.reference().forward(tokens[None])[0]
    found = run_sequence(model.runner(isa=isa, threads=2), config, tokens, blocks_for(70), 64)
    assert nmse(found, expected) <= bound(weight_type)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("weight_type", WeightType)
def test_fast_activations_stay_near_the_reference(weight_type: WeightType, isa: str) -> None:
    config = small_config()
    model = Model.random(config, [weight_type])
    tokens = random_tokens(config, 70)
    expected = model.reference().forward(tokens[None])[0]
    runner = model.runner(isa=isa, threads=2, activations="fast")
    # Rounding to 8 bits, a scale for each 16, leaves 2e-5 in each product; codes of 16 bits 1e-8.
    limit = 1e-6 if weight_type.is_float else 5e-4
    assert nmse(run_sequence(runner, config, tokens, blocks_for(70), 64), expected) <= limit


def test_which_inputs_fast_activations_round_to_8_bits() -> None:
    config = small_config(num_hidden_layers=1, no_rope_layers=[1], tie_word_embeddings=False)
    plain = Model.random(config, [WeightType.F32])
    tokens = random_tokens(config, 40)

    def changes(name: str) -> bool:
        """Whether the choice makes a difference where only this weight is quantized."""
        rows, columns = plain.program.weights[name]
        data = random_blocks(np.random.default_rng(5), WeightType.Q4_0, rows, columns)
        weight = _core.Weight("Q4_0", rows, columns, data)
        model = Model(config, plain.program, {**plain.native, name: weight})
        exact, fast = (
            run_sequence(model.runner(activations=kind), config, tokens, blocks_for(40), 40)
            for kind in ("exact", "fast")
        )
        return not np.array_equal(exact, fast)

    matrices = [name for name, shape in plain.program.weights.items() if len(shape) == 2]
    kept = {"embed_tokens", "v_proj", "lm_head"}
    assert {name.split(".")[-2]: changes(name) for name in matrices} == {
        name.split(".")[-2]: name.split(".")[-2] not in kept for name in matrices
    }


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(3, 130)),
        "hidden_size": 32 * draw(st.integers(1, 5)),
        "intermediate_size": 32 * draw(st.integers(1, 5)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.integers(1, 4)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from((32, 40, 48, 64, 80, 128))),
        "no_rope_layers": draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }


@given(
    shape=shapes(),
    types=st.lists(st.sampled_from([*FLOATS, WeightType.Q8_0, WeightType.Q4_1]), min_size=1),
    isa=st.sampled_from(_core.isas()),
    threads=st.integers(1, 4),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=40)
def test_any_shape_agrees_with_the_reference(
    shape: dict[str, Any],
    types: list[WeightType],
    isa: str,
    threads: int,
    chunk: int,
    seed: int,
) -> None:
    config = small_config(**shape)
    if config.num_attention_heads * config.head_dim % 32 != 0:
        types = [t for t in types if t.is_float] or [WeightType.F16]
    model = Model.random(config, types, seed)
    tokens = random_tokens(config, 40, seed)
    expected = model.reference().forward(tokens[None])[0]
    runner = model.runner(isa=isa, threads=threads)
    found = run_sequence(runner, config, tokens, blocks_for(40), chunk)
    assert nmse(found, expected) <= bound(*types)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("types", [MIX, *((t,) for t in FLOATS)], ids=lambda t: t[0].value)
def test_same_bits_whatever_the_threads_and_chunks(types: tuple[WeightType, ...], isa: str) -> None:
    config = small_config(attention_bias=True, mlp_bias=True)
    model = Model.random(config, types)
    tokens = random_tokens(config, 130)
    first = run_sequence(model.runner(isa=isa), config, tokens, blocks_for(130), 130)
    assert np.isfinite(first).all()
    for threads in (1, 2, 4):
        runner = model.runner(isa=isa, threads=threads)
        for chunk in (1, 7, 64, 130):
            blocks = blocks_for(130)[::-1].copy()  # where blocks stand does not matter either
            found = run_sequence(runner, config, tokens, blocks, chunk)
            assert np.array_equal(first, found), f"{threads} threads, chunks of {chunk}"


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("activations", ["exact", "fast"])
@pytest.mark.parametrize("types", [MIX, FLOATS, FLOATS[2:]], ids=lambda t: t[-1].value)
def test_same_bits_where_threads_keep_their_tokens(
    types: tuple[WeightType, ...], activations: Activations, isa: str
) -> None:
    # As they do from 96 tokens of a step for each thread on, but with F16 where it stays F16.
    config = small_config(max_position_embeddings=1024)
    model = Model.random(config, types)
    tokens = random_tokens(config, 501)
    alone = model.runner(isa=isa, activations=activations)
    first = run_sequence(alone, config, tokens, blocks_for(501), 90)
    assert np.isfinite(first).all()
    zeros, table, some = np.zeros(501), blocks_for(501)[None, :], [500, 3, 333, 3]
    for threads in (3,) if isa == "scalar" else (2, 3, 5):  # scalar kernels take their time
        runner = model.runner(
            isa=isa, activations=activations, threads=threads, max_step_tokens=501
        )
        for chunk in (501, 300):
            found = run_sequence(runner, config, tokens, blocks_for(501), chunk)
            assert np.array_equal(first, found), f"{threads} threads, chunks of {chunk}"
        found = step(runner, config, tokens, np.arange(501), zeros, table, some)
        assert np.array_equal(first[some], found), f"{threads} threads, some rows"
        # Two sequences: the second is the first 200 tokens again.
        found = step(
            runner,
            config,
            np.concatenate([tokens[:301], tokens[:200]]),
            np.concatenate([np.arange(301), np.arange(200)]),
            np.repeat([0, 1], [301, 200]),
            np.stack([blocks_for(320), blocks_for(320, 16)]),
        )
        assert np.array_equal(np.concatenate([first[:301], first[:200]]), found)


@pytest.mark.parametrize("isa", _core.isas())
def test_same_bits_of_tokens_that_look_far_back(isa: str) -> None:
    # Past 256 tokens, several threads share the attention of one token.
    config = small_config(max_position_embeddings=1024)
    model = Model.random(config, MIX)
    tokens = random_tokens(config, 600)
    first = run_sequence(model.runner(isa=isa), config, tokens, blocks_for(600), 256)
    assert np.isfinite(first).all()
    for threads, begin in ((1, 590), (2, 500), (4, 590)):
        runner = model.runner(isa=isa, threads=threads)
        run_sequence(runner, config, tokens[:begin], blocks_for(600), 100)
        # Beside a short sequence in blocks of its own, whose past is all zeros.
        for position in range(begin, 600):
            found = step(
                runner,
                config,
                tokens[[position, 3]],
                [position, 3],
                [0, 1],
                np.stack([blocks_for(600), blocks_for(600, 19)]),
            )
            assert np.array_equal(found[0], first[position]), f"{threads} threads, at {position}"


@pytest.mark.parametrize("isa", _core.isas())
def test_same_bits_alone_and_among_sixteen(isa: str) -> None:
    config = small_config()
    model = Model.random(config, MIX)
    random = np.random.default_rng(5)
    sequences = 16
    lengths = random.integers(1, 90, sequences)
    tokens = [random_tokens(config, int(n), 100 + i) for i, n in enumerate(lengths)]
    blocks = random.permutation(3 * sequences).reshape(sequences, 3)

    runner = model.runner(isa=isa, threads=2)
    logits: list[list[Any]] = [[] for _ in range(sequences)]
    fed = np.zeros(sequences, dtype=int)
    while (fed < lengths).any():
        # Some tokens of some sequences, interleaved; each sequence keeps its order.
        counts = np.minimum(random.integers(0, 12, sequences), lengths - fed)
        owners = random.permutation(np.repeat(np.arange(sequences), counts))
        if len(owners) == 0:
            continue
        positions = []
        for owner in owners:
            positions.append(fed[owner])
            fed[owner] += 1
        ids = [tokens[o][p] for o, p in zip(owners, positions, strict=True)]
        rows = step(runner, config, ids, positions, owners, blocks)
        for owner, row in zip(owners, rows, strict=True):
            logits[owner].append(row)

    for i in range(sequences):
        alone = model.runner(isa=isa)
        expected = run_sequence(alone, config, tokens[i], blocks_for(96), 256)
        assert np.array_equal(np.stack(logits[i]), expected), f"sequence {i}"


def test_the_check_of_bits_can_fail() -> None:
    """The same function, summed in another order, is close but not equal."""
    config = small_config()
    model = Model.random(config, [WeightType.F32])
    tokens = random_tokens(config, 40)
    expected = run_sequence(model.runner(), config, tokens, blocks_for(40), 40)

    order = np.random.default_rng(2).permutation(config.hidden_size)
    shuffled = Model(config, model.program)
    for name, values in model.values.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values = values[order]
        elif not name.endswith(".bias"):
            values = values[..., order]
        values = np.ascontiguousarray(values)
        shuffled.native[name] = (
            values
            if values.ndim == 1
            else _core.Weight("F32", len(values), len(values[0]), values.view(np.uint8).reshape(-1))
        )
    found = run_sequence(shuffled.runner(), config, tokens, blocks_for(40), 40)
    assert nmse(found, expected) < 1e-8
    assert not np.array_equal(found, expected)


def test_logits_only_of_the_rows_asked_for_and_their_hidden_states() -> None:
    config = small_config()
    model = Model.random(config, MIX)
    tokens = random_tokens(config, 20)
    blocks = blocks_for(20)[None]
    every = step(model.runner(), config, tokens, np.arange(20), np.zeros(20), blocks)
    for rows in ([], [19], [3, 3, 0], [7, 19]):
        hidden = np.full((len(rows), config.hidden_size), np.nan, dtype=np.float32)
        found = step(
            model.runner(threads=2),
            config,
            tokens,
            np.arange(20),
            np.zeros(20),
            blocks,
            rows,
            hidden,
        )
        assert np.array_equal(found, every[rows])
        # The tied head is the first matrix of the mix: logits follow from the hidden state.
        head = model.values["model.embed_tokens.weight"].astype(np.float64)
        assert rows == [] or nmse(found, hidden.astype(np.float64) @ head.T) < 1e-6


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("activations", ["exact", "fast"])
def test_same_bits_after_chunks_that_want_no_logits_or_few(
    isa: str, activations: Activations
) -> None:
    # The last layer is then computed for few tokens or none, all but its K and V.
    config = small_config(num_hidden_layers=2)
    model = Model.random(config, MIX)
    tokens = random_tokens(config, 80)
    blocks = blocks_for(80)[None]
    every = step(
        model.runner(isa=isa, activations=activations),
        config,
        tokens,
        np.arange(80),
        np.zeros(80),
        blocks,
    )
    runner = model.runner(isa=isa, activations=activations, threads=2)
    begin = 0
    for count, rows in ((30, []), (1, []), (33, [32, 4, 5, 6]), (7, [0, 2]), (9, [8])):
        end = begin + count
        found = step(
            runner,
            config,
            tokens[begin:end],
            np.arange(begin, end),
            np.zeros(count),
            blocks,
            rows,
        )
        assert np.array_equal(found, every[[begin + row for row in rows]])
        begin = end


def test_a_stale_block_changes_nothing_even_when_it_holds_nan() -> None:
    config = small_config()
    model = Model.random(config, [WeightType.F32])
    poisoned = dict(model.native)
    name = "model.layers.0.input_layernorm.weight"
    poisoned[name] = np.full(config.hidden_size, np.nan, dtype=np.float32)
    tokens = random_tokens(config, 10)
    clean = run_sequence(model.runner(), config, tokens, blocks_for(10), 10)

    runner = model.runner()
    # A table may name anything past the tokens that are looked at, and a block may hold anything.
    ill = Model(config, model.program, poisoned).runner()
    assert np.isnan(run_sequence(ill, config, random_tokens(config, 32), blocks_for(32), 32)).all()
    tables = ints([[5, -7, 2_000_000_000]])
    found = step(runner, config, tokens, np.arange(10), np.zeros(10), tables)
    assert np.array_equal(found, clean)
    runner.zero_blocks(ints([5]))
    runner.release_blocks(ints([5, 6]))
    again = step(runner, config, tokens, np.arange(10), np.zeros(10), tables)
    assert np.array_equal(again, clean)


def test_a_prefix_may_be_shared_between_sequences() -> None:
    config = small_config()
    model = Model.random(config, MIX)
    prefix = random_tokens(config, 2 * BLOCK_TOKENS)
    ends = [random_tokens(config, 9, seed) for seed in (7, 8)]
    runner = model.runner(threads=2)
    run_sequence(runner, config, prefix, blocks_for(64), 50)
    found = step(
        runner,
        config,
        np.concatenate(ends),
        np.tile(np.arange(64, 73), 2),
        np.repeat([0, 1], 9),
        [[0, 1, 2], [0, 1, 3]],
    )
    for i, end in enumerate(ends):
        whole = np.concatenate((prefix, end))
        expected = run_sequence(model.runner(), config, whole, blocks_for(73), 73)[64:]
        assert np.array_equal(found[9 * i : 9 * i + 9], expected)


def test_the_number_of_threads_can_change() -> None:
    config = small_config()
    model = Model.random(config, MIX)
    tokens = random_tokens(config, 20)
    runner = model.runner(threads=1)
    expected = run_sequence(runner, config, tokens, blocks_for(20), 20)
    for threads in (3, 1, 2):
        runner.set_threads(threads)
        assert runner.threads == threads
        found = run_sequence(runner, config, tokens, blocks_for(20), 5)
        assert np.array_equal(found, expected)


def test_floating_point_settings_of_the_caller_do_not_matter() -> None:
    """Another library may have told this thread to flush small numbers to zero, or to round up."""
    import ctypes

    config = small_config()
    model = Model.random(config, [WeightType.Q8_0])
    tokens = random_tokens(config, 20)
    expected = run_sequence(model.runner(), config, tokens, blocks_for(20), 20)
    runner = model.runner()
    library = ctypes.CDLL(None)
    upward = 0x800  # FE_UPWARD of x86; elsewhere the call does nothing, or means another mode
    before = library.fegetround()
    library.fesetround(upward)
    try:
        runner.set_threads(3)  # new threads start as the one that makes them
        found = run_sequence(runner, config, tokens, blocks_for(20), 20)
        kept = library.fegetround()
    finally:
        library.fesetround(before)
    assert kept in (upward, before)
    assert np.array_equal(found, expected)
