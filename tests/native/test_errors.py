"""Whatever is wrong with a call is said before anything is computed, and breaks nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from smolrun import _core
from smolrun.engine.native import resolve_isa
from smolrun.errors import ResourceError
from smolrun.quant.types import WeightType
from tests.native.models import Model, blocks_for, ints, run_sequence, small_config, step
from tests.waiting import SECONDS, joined, started

CONFIG = small_config(attention_bias=True)
MODEL = Model.random(CONFIG, [WeightType.F32])
VOCAB = CONFIG.vocab_size


def arguments() -> dict[str, Any]:
    return {
        "tokens": ints([1, 2, 3]),
        "positions": ints([0, 1, 0]),
        "sequences": ints([0, 0, 1]),
        "block_tables": ints([[0, 1], [2, 3]]),
        "logit_rows": ints([1, 2]),
        "logits": np.full((2, VOCAB), 7, dtype=np.float32),
        "hidden": np.full((2, CONFIG.hidden_size), 7, dtype=np.float32),
    }


def readonly(array: Any) -> Any:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("tokens", ints([1, 2, -1]), ValueError, r"tokens\[2\] is -1"),
        ("tokens", ints([VOCAB, 2, 1]), ValueError, rf"tokens\[0\] is {VOCAB}; expected 0 to"),
        ("tokens", ints([1, 2]), ValueError, r"positions: expected shape \(2,\), found \(3,\)"),
        ("tokens", ints([]), ValueError, "positions: expected shape"),
        ("tokens", ints(range(9)), ValueError, "positions: expected shape"),
        ("tokens", np.array([1, 2, 3]), TypeError, "tokens: expected a C-contiguous int32"),
        ("tokens", [1, 2, 3], TypeError, "tokens: expected"),
        ("tokens", None, TypeError, "incompatible function arguments"),
        ("tokens", ints([[1, 2, 3]]), ValueError, "tokens: expected 1 dimensions, found 2"),
        ("tokens", ints(range(6))[::2], TypeError, "tokens: expected a C-contiguous"),
        ("tokens", ints([1, 2, 3]).astype(">i4"), TypeError, "tokens: expected"),
        ("positions", ints([0, 1, -1]), ValueError, r"positions\[2\] is -1"),
        ("positions", ints([63, 64, 0]), ValueError, r"positions\[1\] is 64; expected 0 to 63"),
        ("positions", ints([1, 0, 0]), ValueError, r"positions\[1\] is 0; the token before it"),
        ("positions", ints([0, 2, 0]), ValueError, r"positions\[1\] is 2; the token before it"),
        ("positions", ints([0, 1]), ValueError, "positions: expected shape"),
        ("sequences", ints([0, 0, 2]), ValueError, r"sequences\[2\] is 2; expected 0 to 1"),
        ("sequences", ints([-1, 0, 1]), ValueError, r"sequences\[0\] is -1"),
        ("block_tables", ints([[0, 1], [-1, 3]]), ValueError, r"block_tables\[1, 0\] is -1"),
        ("block_tables", ints([[4, 1], [0, 3]]), ValueError, r"block_tables\[0, 0\] is 4"),
        ("block_tables", ints([[0, 1], [0, 3]]), ValueError, "two tokens .* slot 0 of block 0"),
        ("block_tables", ints([0, 1]), ValueError, "block_tables: expected 2 dimensions"),
        ("block_tables", np.zeros((0, 2), np.int32), ValueError, r"sequences\[0\] is 0"),
        ("block_tables", np.zeros((2, 0), np.int32), ValueError, r"positions\[0\] is 0"),
        ("logit_rows", ints([1, 3]), ValueError, r"logit_rows\[1\] is 3; expected 0 to 2"),
        ("logit_rows", ints([-1, 0]), ValueError, r"logit_rows\[0\] is -1"),
        ("logit_rows", ints([0]), ValueError, "logits: expected shape"),
        ("logits", np.zeros((2, VOCAB + 1), np.float32), ValueError, "logits: expected shape"),
        ("logits", np.zeros((3, VOCAB), np.float32), ValueError, "logits: expected shape"),
        ("logits", np.zeros((2, VOCAB)), TypeError, "logits: expected a C-contiguous writable"),
        ("logits", np.zeros((VOCAB, 2), np.float32).T, TypeError, "logits: expected"),
        ("logits", readonly(np.zeros((2, VOCAB), np.float32)), TypeError, "writable"),
        ("hidden", np.zeros((2, 3), np.float32), ValueError, "hidden: expected shape"),
    ],
)
def test_a_bad_array_is_named(name: str, value: Any, error: type[Exception], message: str) -> None:
    runner = MODEL.runner(kv_blocks=4, max_step_tokens=8)
    call = arguments()
    call[name] = value
    with pytest.raises(error, match=message):
        runner.step(**call)
    assert (call["logits"] == 7).all() or name == "logits"
    good = arguments()
    runner.step(**good)
    assert np.isfinite(good["logits"]).all()
    assert (good["logits"] != 7).all()


def test_unaligned_arrays_are_refused() -> None:
    call = arguments()
    call["tokens"] = np.frombuffer(bytes(13), dtype=np.uint8)[1:].view(np.int32)
    with pytest.raises(TypeError, match="tokens: .*aligned"):
        MODEL.runner(kv_blocks=4).step(**call)


def test_too_many_tokens_and_none() -> None:
    runner = MODEL.runner(max_step_tokens=8)
    with pytest.raises(ValueError, match="tokens has 9 values; a step takes 1 to 8"):
        run_sequence(runner, CONFIG, ints(range(9)), blocks_for(9), 9)
    with pytest.raises(ValueError, match="tokens has 0 values; a step takes 1 to 8"):
        step(runner, CONFIG, [], [], [], [[0]])


@pytest.mark.parametrize("blocks", [[-1], [0, 4], [2_000_000_000]])
def test_bad_blocks(blocks: list[int]) -> None:
    runner = MODEL.runner(kv_blocks=4)
    for wipe in (runner.zero_blocks, runner.release_blocks):
        with pytest.raises(ValueError, match=r"blocks\[\d\] is .*expected 0 to 3"):
            wipe(ints(blocks))


# --- linking


def link(change: Callable[[dict[str, Any]], None]) -> _core.Runner:
    inverse_frequencies, factor = CONFIG.rope_parameters()
    keywords: dict[str, Any] = {
        "operations": [operation.as_dict() for operation in MODEL.program.operations],
        "weights": dict(MODEL.native),
        "buffers": dict(MODEL.program.buffers),
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_key_value_heads": CONFIG.num_key_value_heads,
        "head_dim": CONFIG.head_dim,
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "vocab_size": VOCAB,
        "inverse_frequencies": inverse_frequencies,
        "attention_factor": factor,
        "kv_blocks": 4,
        "threads": 1,
        "isa": "scalar",
    }
    change(keywords)
    return _core.Runner(**keywords)


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets keywords[path[0]][path[1]]... to value."""

    def change(keywords: dict[str, Any]) -> None:
        target: Any = keywords
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def operation(kind: str) -> int:
    return [o.kind for o in MODEL.program.operations].index(kind)


QKV, MIX, ADD = operation("norm_qkv"), operation("attention"), operation("linear_add")
FFN, END = operation("norm_swiglu"), operation("norm_logits")
Q_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.k_proj.bias"


def weight(rows: int, columns: int) -> _core.Weight:
    return _core.Weight("F32", rows, columns, np.zeros(4 * rows * columns, dtype=np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("operations", 0, "kind", value="embedding"), r"operation 0 \(embedding\): unknown"),
        (put("operations", 0, "colour", value=1), r"\(embed\): unknown field 'colour'"),
        (put("operations", 0, "weight", value="nothing"), "weight 'nothing' is missing"),
        (put("operations", 0, "weight", value=None), "field 'weight': expected a name"),
        (put("operations", 0, "weight", value=NORM), "is an array; expected a Weight"),
        (put("operations", 0, "out", value="nowhere"), "there is no buffer 'nowhere'"),
        (put("operations", QKV, "norm", value=Q_WEIGHT), "is a Weight; expected a float32 array"),
        (put("operations", QKV, "layer", value=2), "layer is 2; expected 0 to 1"),
        (put("operations", QKV, "layer", value=-1), "layer is -1"),
        (put("operations", QKV, "layer", value="0"), "field 'layer': expected a whole number"),
        (put("operations", QKV, "layer", value=1), "layer 0 has no norm_qkv before it"),
        (put("operations", QKV, "rope", value=None), "field 'rope': expected true or false"),
        (put("operations", QKV, "epsilon", value=-1.0), "expected 0 <= epsilon"),
        (put("operations", QKV, "epsilon", value=float("nan")), "expected 0 <= epsilon"),
        (put("weights", Q_WEIGHT, value=weight(256, 255)), r"\(256, 255\); expected \(256, 256\)"),
        (put("weights", Q_WEIGHT, value=weight(8, 256)), rf"\(norm_qkv\): weight '{Q_WEIGHT}'"),
        (put("weights", NORM, value=np.ones(255, np.float32)), "has 255 values; expected 256"),
        (put("weights", BIAS, value=np.ones(65, np.float32)), "has 65 values; expected 64"),
        (put("operations", MIX, "out", value=None), "field 'out': expected a name"),
        (put("operations", ADD, "input", value="nowhere"), "there is no buffer 'nowhere'"),
        (put("num_attention_heads", value=7), "expected a multiple of num_key_value_heads"),
        (put("num_attention_heads", value=10), r"operation 1 \(norm_qkv\)"),
        (put("num_key_value_heads", value=0), "num_key_value_heads is 0"),
        (put("head_dim", value=31), "head_dim is 31; expected an even number"),
        (put("head_dim", value=64), "inverse_frequencies has 16 values; expected .* 32"),
        (put("vocab_size", value=299), r"\(embed\): weight .*\(300, 256\); expected \(299, 256\)"),
        (put("num_hidden_layers", value=1), "layer is 1; expected 0 to 0"),
        (put("num_hidden_layers", value=0), "num_hidden_layers is 0"),
        (put("attention_factor", value=float("inf")), "not finite"),
        (put("kv_blocks", value=0), "kv_blocks is 0"),
        (put("kv_blocks", value=1 << 31), "kv_blocks is 2147483648"),
        (put("max_step_tokens", value=0), "max_step_tokens is 0"),
        (put("threads", value=0), "threads is 0"),
        (put("isa", value="mmx"), "this CPU runs scalar.*, not 'mmx'"),
        (put("activations", value="int8"), "activations is 'int8'; expected 'exact' or 'fast'"),
        (put("operations", value=[]), "no norm_logits"),
    ],
)
def test_a_listing_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    link(lambda keywords: None)
    with pytest.raises(ValueError, match=message):
        link(change)


def test_a_buffer_must_be_written_before_it_is_read() -> None:
    def swap(keywords: dict[str, Any]) -> None:
        keywords["operations"] = keywords["operations"][1:]

    with pytest.raises(ValueError, match=r"operation 0 \(norm_qkv\): buffer .* is read before"):
        link(swap)


def test_input_and_output_must_differ() -> None:
    out = MODEL.program.operations[QKV].as_dict()["out"]
    with pytest.raises(ValueError, match=r"\(attention\): input and out are both"):
        link(put("operations", MIX, "out", value=out))


def test_a_vector_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=f"{NORM}: expected a C-contiguous float32 array"):
        link(put("weights", NORM, value=np.ones(256)))


def test_a_cache_that_the_system_refuses() -> None:
    wide = small_config(
        hidden_size=32, num_attention_heads=16, num_key_value_heads=16, head_dim=128,
        num_hidden_layers=32, no_rope_layers=None,
    )  # fmt: skip
    model = Model.random(wide, [WeightType.F16])
    with pytest.raises(ResourceError, match="KV cache of .* tokens"):
        model.runner(kv_blocks=(1 << 31) - 1)


# --- use from several threads


def test_one_step_at_a_time() -> None:
    """Of calls that overlap, some are refused, and none breaks another."""
    runner = MODEL.runner(kv_blocks=8, threads=2)
    tokens = ints(range(100))
    expected = run_sequence(MODEL.runner(), CONFIG, tokens, blocks_for(100), 100)
    refused, wrong = [], []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait(SECONDS)
        for _ in range(20):
            try:
                found = run_sequence(runner, CONFIG, tokens, blocks_for(100), 100)
            except RuntimeError as error:
                refused.append(str(error))
            else:
                if not np.array_equal(found, expected):
                    wrong.append(found)

    joined([started(work) for _ in range(4)])
    assert not wrong
    assert all("one at a time" in message for message in refused)
    assert np.array_equal(run_sequence(runner, CONFIG, tokens, blocks_for(100), 7), expected)


# --- instruction sets


def test_the_instruction_set_is_chosen_or_forced() -> None:
    assert resolve_isa(environ={}) == _core.default_isa() == _core.isas()[-1]
    assert resolve_isa(environ={"SMOLRUN_ISA": "scalar"}) == "scalar"
    assert resolve_isa("scalar", {"SMOLRUN_ISA": "nonsense"}) == "scalar"
    with pytest.raises(ResourceError, match="SMOLRUN_ISA is 'neon'; this CPU runs scalar"):
        resolve_isa(environ={"SMOLRUN_ISA": "neon"})
    with pytest.raises(ResourceError, match="isa is 'sse9'"):
        resolve_isa("sse9", {})


def test_the_instruction_sets_match_what_the_system_reports() -> None:
    machine = _core.machine()
    flags = set(machine["flags"])
    needed = {
        "avx2": {"avx2", "fma", "f16c", "bmi2"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    }
    for isa in _core.isas()[1:]:
        assert needed[isa] <= flags
    assert 1 <= machine["physical_cores"] <= machine["affinity"]
