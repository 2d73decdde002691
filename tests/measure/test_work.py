"""Bytes and operations, against numbers reckoned by hand from the published shapes."""

from __future__ import annotations

import pytest

from smolrun.engine.native import Activations
from smolrun.measure.work import StepShape, Work, WorkCounter, arithmetic_of, chunks, total
from smolrun.model.llama import build
from smolrun.model.presets import preset
from smolrun.model.program import Program
from smolrun.quant.types import WeightType
from tests.measure.support import ceilings

# SmolLM2-135M: per layer q and o 576 x 576, k and v 192 x 576, gate, up and down 576 x 1536.
LAYERS_135M = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
HEAD_135M = 49152 * 576
KV_135M = 30 * 2 * 3 * (64 * 2 + 4)  # bytes a token: layers, K and V, heads, codes and a scale
# SmolLM3-3B: 16 heads of 128 over 4 KV heads, 36 layers.
LAYERS_3B = 36 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 11008)
HEAD_3B = 128256 * 2048


def counter(name: str, weight_type: WeightType, activations: Activations = "exact") -> WorkCounter:
    program = build(preset(name))
    return WorkCounter(program, dict.fromkeys(matrices(program), weight_type), activations)


def matrices(program: Program) -> list[str]:
    return [name for name, shape in program.weights.items() if len(shape) == 2]


def test_the_constants() -> None:
    assert (LAYERS_135M, HEAD_135M, KV_135M) == (106_168_320, 28_311_552, 23_760)
    assert LAYERS_3B + HEAD_3B == 3_074_949_120


def test_a_decoded_token_reads_every_weight_once() -> None:
    work = counter("SmolLM2-135M", WeightType.BF16, "fast").step(StepShape())
    assert work.weight_bytes == 2 * (LAYERS_135M + HEAD_135M) + 2 * 576
    assert work.kv_bytes == 2 * KV_135M  # written, and read again
    assert work.operations == {
        # Attention, one token seen: q k and p v.
        "int16": 2 * (LAYERS_135M + HEAD_135M) + 30 * 4 * 576,
    }
    assert work.total_operations == 268_959_744 + 69_120


def test_a_context_adds_its_keys_and_values() -> None:
    count = counter("SmolLM3-3B", WeightType.Q4_K)
    work = count.step(StepShape(1, start=4096))
    assert work.weight_bytes == (LAYERS_3B + HEAD_3B) * 144 // 256 + 2048 * 144 // 256
    assert work.kv_bytes == (4097 + 1) * 36 * 2 * 4 * (128 * 2 + 4)
    assert round((work.kv_bytes - count.step(StepShape()).kv_bytes) / 1e6) == 307
    attention = 36 * 4 * 16 * 128 * 4097
    assert work.operations == {"int16": 2 * (LAYERS_3B + HEAD_3B) + attention}


def test_a_prompt_computes_only_what_its_last_token_needs_after_the_last_keys() -> None:
    work = counter("SmolLM2-135M", WeightType.F16).steps(chunks(512, 0, 256))
    layer, keys = LAYERS_135M // 30, 2 * 192 * 576
    attended = 512 * 513 // 2
    assert work.operations == {
        "f32": 2 * (512 * (29 * layer + keys) + layer - keys + HEAD_135M),
        "int16": 4 * 576 * (29 * attended + 512),
    }
    embedded = 512 * 2 * 576
    assert work.weight_bytes == 2 * (2 * LAYERS_135M - (layer - keys) + HEAD_135M) + embedded
    assert work.kv_bytes == KV_135M * (512 + 512) + KV_135M * 256 * 29 // 30


def test_sequences_share_the_weights_and_nothing_else() -> None:
    count = counter("SmolLM2-135M", WeightType.Q8_0)
    one, eight = count.step(StepShape(1, 100)), count.step(StepShape(1, 100, sequences=8))
    row = 576 // 32 * 34  # of the embedding
    assert eight.weight_bytes - one.weight_bytes == 7 * row
    assert eight.kv_bytes == 8 * one.kv_bytes
    assert eight.operations == {name: 8 * n for name, n in one.operations.items()}


def test_types_may_be_mixed() -> None:
    program = build(preset("SmolLM2-135M"))
    types = dict.fromkeys(matrices(program), WeightType.Q4_0)
    types["model.embed_tokens.weight"] = WeightType.F32
    work = WorkCounter(program, types).step(StepShape())
    assert work.weight_bytes == LAYERS_135M * 18 // 32 + 4 * HEAD_135M + 4 * 576
    assert work.operations == {"int16": 2 * LAYERS_135M + 30 * 4 * 576, "f32": 2 * HEAD_135M}


def test_the_arithmetic_of_a_type() -> None:
    for bits, codes in ((8, True), (16, True), (16, False)):
        for weight_type in (WeightType.F16, WeightType.BF16):
            expected = "int16" if codes else "f32"
            assert arithmetic_of(weight_type, bits, codes=codes) == expected
        assert arithmetic_of(WeightType.F32, bits, codes=codes) == "f32"
        for weight_type in (WeightType.Q4_K, WeightType.IQ4_NL):
            assert arithmetic_of(weight_type, bits, codes=codes) == f"int{bits}"


def test_fast_activations_leave_the_head_and_v_as_they_are() -> None:
    work = counter("SmolLM2-135M", WeightType.Q8_0, "fast").step(StepShape())
    v = 30 * 192 * 576
    assert work.operations == {
        "int8": 2 * (LAYERS_135M - v),
        "int16": 2 * (HEAD_135M + v) + 30 * 4 * 576,
    }
    exact = counter("SmolLM2-135M", WeightType.Q8_0).step(StepShape())
    assert exact.operations == {"int16": 2 * (LAYERS_135M + HEAD_135M) + 30 * 4 * 576}


def test_chunks_cover_the_prompt() -> None:
    assert chunks(513, 10, 256) == [
        StepShape(256, 10, logits=False),
        StepShape(256, 266, logits=False),
        StepShape(1, 522, logits=True),
    ]
    assert chunks(256, 0, 256) == [StepShape(256, 0)]
    assert sum(shape.attended for shape in chunks(513, 0, 100)) == 513 * 514 // 2


def test_the_bound_is_what_takes_longer() -> None:
    machine = ceilings()  # 10 GB/s; 100, 200 and 400 GOP/s
    work = Work(10**9, 0, {"int8": 400 * 10**6})
    assert machine.bound(work) == (0.1, "memory")
    work = Work(10**6, 10**6, {"int8": 400 * 10**9, "f32": 50 * 10**9})
    assert machine.bound(work) == (1.5, "int8")
    assert machine.share(work, 3.0) == 0.5
    assert machine.bound(Work()) == (0.0, "memory")
    assert machine.share(Work(), 1.0) is None
    assert ceilings("int16").bound(Work(0, 0, {"int16": 100 * 10**9})) == (1.0, "int16")


def test_work_adds_up() -> None:
    parts = [Work(1, 2, {"f32": 3}), Work(10, 20, {"f32": 30, "int8": 5}), Work()]
    assert total(parts) == Work(11, 22, {"f32": 33, "int8": 5})


def test_unknown_operations_are_refused() -> None:
    from smolrun.model.program import Operation

    with pytest.raises(ValueError, match="no count"):
        counter("SmolLM2-135M", WeightType.F32).operation(Operation(), StepShape())
