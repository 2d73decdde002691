"""Weights made ready for the kernels: what is copied, what is given back."""

from __future__ import annotations

import gc
import mmap
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun import _core
from smolrun.quant.types import WeightType
from tests.native.mappings import resident_around
from tests.native.models import Model, blocks_for, ints, random_blocks, run_sequence, small_config
from tests.waiting import eventually, joined, started

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


Source = tuple[str, int, int, Any, int, bool, bool]


def packed(sources: list[Source], threads: int) -> list[_core.Weight]:
    packing = _core.Packing(sources)
    helpers = [started(packing.work, 1 << 62) for _ in range(threads - 1)]
    assert eventually(lambda: packing.work(1))
    joined(helpers)
    return packing.weights()


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@linux_only
def test_weights_that_are_gone_give_their_memory_back() -> None:
    size = 4096 * 4096
    data = np.ones(size * 2, dtype=np.uint8)
    before = resident_bytes()
    first = _core.Weight("F16", 4096, 4096, data)
    second = _core.Weight("F16", 4096, 4096, data)
    assert resident_bytes() >= before + 4 * size - (4 << 20)
    del first  # the second, which may share its mapping, stays
    assert resident_bytes() <= before + 2 * size + (4 << 20)
    del second
    assert resident_bytes() <= before + (4 << 20)


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_weights_are_copied_from_any_address(weight_type: WeightType) -> None:
    config = small_config(num_hidden_layers=1)
    model = Model.random(config, [weight_type])
    rows, columns = config.num_attention_heads * config.head_dim, config.hidden_size
    data = random_blocks(np.random.default_rng(4), weight_type, rows, columns)
    odd = np.empty(data.size + 1, dtype=np.uint8)[1:]  # at no aligned address
    odd[:] = data
    references = sys.getrefcount(odd)
    moved = _core.Weight(weight_type.value, rows, columns, odd)
    assert sys.getrefcount(odd) == references
    weight = _core.Weight(weight_type.value, rows, columns, data)
    assert np.array_equal(logits_with(moved, model), logits_with(weight, model))


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_rows_are_filled_up_to_groups_of_sixteen(weight_type: WeightType) -> None:
    data = random_blocks(np.random.default_rng(0), weight_type, 20, 256)
    weight = _core.Weight(weight_type.value, 20, 256, data)
    assert (weight.type, weight.rows, weight.columns) == (weight_type.value, 20, 256)
    assert weight.nbytes == 32 * weight_type.row_bytes(256)


def logits_with(q_weight: _core.Weight, model: Model) -> Any:
    changed = dict(model.native)
    changed["model.layers.0.self_attn.q_proj.weight"] = q_weight
    tokens = ints(range(40))
    runner = Model(model.config, model.program, changed).runner()
    return run_sequence(runner, model.config, tokens, blocks_for(40), 40)


@pytest.mark.parametrize("weight_type", [WeightType.F16, WeightType.Q4_K, WeightType.Q8_0])
def test_threads_and_interleaved_rows(weight_type: WeightType) -> None:
    """Rows in GGUF's order (2i+j for j*D/2+i), packed by any number of threads."""
    # 10 MiB of F16: several chunks to share among the threads.
    config = small_config(num_attention_heads=160, num_key_value_heads=1, num_hidden_layers=1)
    model = Model.random(config, [WeightType.F32])
    rows, head_dim = config.num_attention_heads * config.head_dim, config.head_dim
    data = random_blocks(np.random.default_rng(3), weight_type, rows, 256)
    in_order = data.reshape(-1, head_dim // 2, 2, weight_type.row_bytes(256))
    straight = np.ascontiguousarray(in_order.transpose(0, 2, 1, 3)).reshape(-1)
    name = weight_type.value
    expected = logits_with(_core.Weight(name, rows, 256, straight), model)
    small = np.zeros(4 * 6 * 5, dtype=np.uint8)
    for threads in (1, 2, 5):
        first, middle, last = packed(
            [
                (name, rows, 256, data, 32, False, False),
                ("F32", 6, 5, small, 0, False, False),
                (name, rows, 256, straight, 0, False, False),
            ],
            threads,
        )
        assert middle.nbytes == 16 * 5 * 4
        for weight in (first, last):
            assert weight.nbytes == rows * weight_type.row_bytes(256)
            assert np.array_equal(logits_with(weight, model), expected)
    assert not np.array_equal(logits_with(_core.Weight(name, rows, 256, data), model), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Q9", 4, 32, 4), "type: 'Q9' is not a weight type"),
        (("F32", 0, 4, 0), "expected 1 to"),
        (("F32", -1, 4, 0), "expected 1 to"),
        (("F32", 1 << 62, 4, 16), "expected 1 to"),
        (("F32", 1 << 31, 1 << 31, 16), "data has 16 bytes|does not fit"),
        (("F32", 4, 4, 63), "data has 63 bytes; expected 64"),
        (("F32", 4, 4, 65), "data has 65 bytes; expected 64"),
        (("Q8_0", 4, 33, 4 * 34), "columns is 33; Q8_0 has blocks of 32"),
        (("Q4_K", 4, 128, 4 * 72), "columns is 128; Q4_K has blocks of 256"),
        (("F32", 6, 4, 96, 3), "interleaved_head_dim is 3"),
        (("F32", 6, 4, 96, 4), "interleaved_head_dim is 4"),
        (("F32", 6, 4, 96, -2), "interleaved_head_dim is -2"),
    ],
)
def test_a_source_that_does_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    name, rows, columns, size, *rest = arguments
    with pytest.raises(ValueError, match=message):
        _core.Weight(name, rows, columns, np.zeros(size, dtype=np.uint8), *rest)


def test_the_source_must_be_bytes_in_one_piece() -> None:
    for data in (np.zeros(16, np.float32), np.zeros(128, np.uint8)[::2], [1, 2], "text"):
        with pytest.raises(TypeError, match="data: expected a C-contiguous uint8 array"):
            _core.Weight("F32", 4, 4, data)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="data: expected a C-contiguous uint8 array"):
            _core.Packing([("F32", 4, 4, data, 0, False, False)])  # type: ignore[list-item]


def test_a_packing_that_is_stopped() -> None:
    data = random_blocks(np.random.default_rng(0), WeightType.Q8_0, 4096, 1024)  # four pieces
    references = sys.getrefcount(data)
    packing = _core.Packing([("Q8_0", 4096, 1024, data, 0, False, False)])
    assert not packing.work(1)
    assert 0 < packing.bytes_done < data.size
    with pytest.raises(RuntimeError, match="not all weights are packed"):
        packing.weights()
    packing.stop()
    assert packing.work(1)
    with pytest.raises(RuntimeError, match="not all weights are packed"):
        packing.weights()
    del packing
    assert sys.getrefcount(data) == references


def test_weights_are_handed_over_once() -> None:
    data = random_blocks(np.random.default_rng(0), WeightType.Q8_0, 64, 64)
    references = sys.getrefcount(data)
    packing = _core.Packing([("Q8_0", 64, 64, data, 0, False, False)])
    assert packing.work(2)
    assert packing.bytes_done == data.size
    (weight,) = packing.weights()
    assert sys.getrefcount(data) == references
    assert packing.weights() == []
    assert packing.work(1)
    assert weight.nbytes == data.size
    nothing = _core.Packing([])
    assert nothing.work(1)
    assert nothing.weights() == []


# --- pages of files


@linux_only
def test_pages_of_a_mapped_file_are_given_back(tmp_path: Path) -> None:
    rows, columns = 4096, 4096
    content = random_blocks(np.random.default_rng(1), WeightType.Q4_0, rows, columns)
    path = tmp_path / "weights"
    path.write_bytes(bytes(100) + content.tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, dtype=np.uint8)[100:]
    kept = _core.Weight("Q4_0", rows, columns, data)
    assert resident_around(data) >= content.size - 8192
    half = data.size // 2
    dropped = packed(
        [("Q4_0", rows // 2, columns, part, 0, True, False) for part in (data[:half], data[half:])],
        threads=2,
    )
    assert resident_around(data) <= 3 * mmap.PAGESIZE
    assert np.array_equal(data, content)  # read again from the file
    del kept, dropped, data
    gc.collect()
    mapped.close()  # a BufferError if anything still held it


@linux_only
def test_memory_that_is_no_file_keeps_its_content() -> None:
    size = WeightType.Q8_0.row_bytes(1024) * 1024
    content = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8).tobytes()
    data = np.frombuffer(content, dtype=np.uint8)  # read-only, but on the heap
    copy = bytes(bytearray(content))
    _core.Weight("Q8_0", 1024, 1024, data, drop_source=True)
    assert content == copy
    anonymous = mmap.mmap(-1, size)
    anonymous.write(content)
    view = np.frombuffer(anonymous, dtype=np.uint8)
    view.flags.writeable = False
    _core.Weight("Q8_0", 1024, 1024, view, drop_source=True)
    assert view.tobytes() == copy


@linux_only
def test_a_consumed_source_gives_its_memory_back() -> None:
    rows, columns = 4096, 2048
    data = random_blocks(np.random.default_rng(1), WeightType.F16, rows, columns).copy()
    before = resident_bytes()
    weights = packed([("F16", rows, columns, data, 0, False, True)], threads=2)
    assert resident_bytes() <= before + (4 << 20)
    assert weights[0].nbytes == data.nbytes
    assert data.nbytes - np.count_nonzero(data == 0) < 1 << 20
    data.flags.writeable = False
    with pytest.raises(ValueError, match="consume_source needs a writable array"):
        _core.Weight("F16", rows, columns, data, consume_source=True)


def test_a_writable_source_is_never_dropped() -> None:
    with pytest.raises(ValueError, match="drop_source needs a read-only view"):
        _core.Weight("Q8_0", 4, 32, np.zeros(136, np.uint8), drop_source=True)


def test_a_runner_keeps_its_weights_alive() -> None:
    config = small_config()
    model = Model.random(config, [WeightType.F32, WeightType.Q8_0])
    tokens = ints(range(30))
    expected = run_sequence(model.runner(), config, tokens, blocks_for(30), 30)
    runner = model.runner()
    holder = weakref.ref(model)
    del model
    gc.collect()
    assert holder() is None
    noise = [np.random.default_rng(0).bytes(1 << 20) for _ in range(8)]  # reuse what was freed
    assert np.array_equal(run_sequence(runner, config, tokens, blocks_for(30), 30), expected)
    assert len(noise) == 8
