"""What the GGUF writer writes, read by the gguf package and by our reader; and what it leaves."""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import OutputError
from smolrun.files.gguf import GgufFile
from smolrun.files.gguf_writer import GgufWriter, TensorInfo, TypedValue, metadata_of
from smolrun.quant.types import WeightType
from tests.package import SOURCE
from tests.waiting import SECONDS

INTEGER_RANGES = {
    **{f"u{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32, 64)},
    **{f"i{bits}": (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (8, 16, 32, 64)},
}
SCALARS = st.one_of(
    *[
        st.tuples(st.just(kind), st.integers(low, high))
        for kind, (low, high) in INTEGER_RANGES.items()
    ],
    st.tuples(st.just("f32"), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just("f64"), st.floats(allow_nan=False)),
    st.tuples(st.just("bool"), st.booleans()),
    st.tuples(st.just("string"), st.text(max_size=20).filter(lambda text: "\0" not in text)),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, min_size=1, max_size=5)).map(
    lambda found: (
        TypedValue(*found)
        if isinstance(found, tuple)
        # An array holds one type: that of the first.
        else TypedValue(f"{found[0][0]}[]", [v for kind, v in found if kind == found[0][0]])
    )
)
INFOS = st.lists(
    st.tuples(
        st.sampled_from(WeightType),
        st.integers(1, 3),
        st.lists(st.integers(1, 5), max_size=2),
    ),
    max_size=5,
).map(
    lambda found: [
        TensorInfo(f"t{index}.weight", kind, (*rows, blocks * kind.block_weights))
        for index, (kind, blocks, rows) in enumerate(found)
    ]
)


def contents(tensors: list[TensorInfo]) -> list[bytes]:
    generator = np.random.default_rng(len(tensors))
    return [generator.bytes(tensor.nbytes) for tensor in tensors]


def write(path: Path, metadata: dict[str, TypedValue], tensors: list[TensorInfo]) -> list[bytes]:
    data = contents(tensors)
    with GgufWriter(path, metadata, tensors) as writer:
        for content in data:
            middle = len(content) // 3
            writer.write(content[:middle])
            writer.write(np.frombuffer(content[middle:], np.uint8))
    assert path.stat().st_size == writer.file_bytes
    return data


@settings(max_examples=40)
@given(
    metadata=st.dictionaries(st.text("abc._", min_size=1, max_size=9), VALUES, max_size=6),
    tensors=INFOS,
    alignment=st.sampled_from([None, 8, 32, 64, 4096]),
)
def test_readers_find_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, TypedValue],
    tensors: list[TensorInfo],
    alignment: int | None,
) -> None:
    path = tmp_path_factory.mktemp("written") / "m.gguf"
    if alignment is not None:
        metadata = {**metadata, "general.alignment": TypedValue("u32", alignment)}
    data = write(path, metadata, tensors)

    ours = GgufFile.open(path)
    assert metadata_of(ours) == metadata
    assert list(ours.metadata) == list(metadata)
    assert [(t.name, t.type, t.shape) for t in ours.tensors.values()] == [
        (t.name, t.type, t.shape) for t in tensors
    ]
    assert [t.data.tobytes() for t in ours.tensors.values()] == data

    theirs = gguf.GGUFReader(path)
    fields = {key: f for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(metadata)
    for key, (_, value) in metadata.items():
        assert fields[key].contents() == value
    assert theirs.alignment == (alignment or 32)
    for tensor, info, content in zip(theirs.tensors, tensors, data, strict=True):
        assert tensor.name == info.name
        assert tensor.tensor_type.name == info.type.value
        assert tuple(reversed(tensor.shape.tolist())) == info.shape
        assert tensor.data_offset % (alignment or 32) == 0
        assert tensor.data.tobytes() == content


def test_a_file_of_another_writer_comes_out_the_same_to_the_byte(shared_data: Path) -> None:
    source = GgufFile.open(shared_data / "tiny-smollm3" / "tiny-smollm3-Q4_K_M.gguf")
    infos = [TensorInfo(t.name, t.type, t.shape) for t in source.tensors.values()]
    writer = GgufWriter("unused", metadata_of(source), infos)
    assert writer.file_bytes == source.file.size
    assert writer._header == source.file.bytes[: len(writer._header)].tobytes()


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"a": ("u33", 1)}, [], "no value type 'u33'"),
        ({"a": ("u8", 256)}, [], "no u8"),
        ({"a": ("u32", -1)}, [], "no u32"),
        ({"a": ("i32", 1.5)}, [], "whole numbers"),
        ({"a": ("string", 5)}, [], "no string"),
        ({"a": ("bool", 1)}, [], "true or false"),
        ({"a": ("i32[]", 5)}, [], r"no i32\[\]"),
        ({"": ("u8", 1)}, [], "1 to 65535 bytes"),
        ({"general.alignment": ("u32", 24)}, [], "power of two"),
        ({"general.alignment": ("i32", 32)}, [], "power of two"),
        ({}, [("x", WeightType.F32, (1,))] * 2, "stands twice"),
        ({}, [("x" * 65, WeightType.F32, (1,))], "1 to 64 bytes"),
        ({}, [("x", WeightType.Q4_K, (2, 255))], "not a multiple"),
        ({}, [("x", WeightType.F32, ())], "1 to 4 dimensions"),
        ({}, [("x", WeightType.F32, (0, 5))], "each at least 1"),
    ],
)
def test_what_gguf_can_not_hold(
    tmp_path: Path,
    metadata: dict[str, tuple[str, object]],
    tensors: list[tuple[str, WeightType, tuple[int, ...]]],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        GgufWriter(
            tmp_path / "m.gguf",
            {key: TypedValue(*value) for key, value in metadata.items()},
            [TensorInfo(*tensor) for tensor in tensors],
        )


# -- what is left where something fails --------------------------------------------------------

TENSORS = [TensorInfo("a", WeightType.F32, (3, 4)), TensorInfo("b", WeightType.F16, (5,))]
SIZES = [tensor.nbytes for tensor in TENSORS]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"what was there")
    return path


def assert_untouched(old: Path) -> None:
    assert old.read_bytes() == b"what was there"
    assert os.listdir(old.parent) == [old.name]


def write_zeros(path: Path, *sizes: int, then: BaseException | None = None) -> None:
    with GgufWriter(path, {}, TENSORS) as writer:
        for size in sizes:
            writer.write(bytes(size))
        if then is not None:
            raise then


@pytest.mark.parametrize("sizes", [(), (5,), (SIZES[0],), (SIZES[0], 9)])
def test_a_file_without_all_its_tensors_is_not_kept(old: Path, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of [ab] were given"):
        write_zeros(old, *sizes)
    assert_untouched(old)


@pytest.mark.parametrize("sizes", [(SIZES[0] + 1,), (*SIZES, 1)])
def test_too_many_bytes(old: Path, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bytes"):
        write_zeros(old, *sizes)
    assert_untouched(old)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_an_interrupted_file_is_not_kept(old: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_zeros(old, SIZES[0], then=error())
    assert_untouched(old)


@pytest.mark.parametrize(
    ("broken", "number", "message"),
    [
        ("fsync", errno.ENOSPC, "No space left on device; make room"),
        ("fsync", errno.EIO, "write it somewhere else"),
        ("replace", errno.EACCES, "Permission denied; write to a folder"),
    ],
)
def test_errors_of_the_system(
    old: Path, monkeypatch: pytest.MonkeyPatch, broken: str, number: int, message: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, broken, fails)
    with pytest.raises(OutputError, match=message) as raised:
        write(old, {}, TENSORS)
    assert str(raised.value).startswith(f"{old}: ")
    monkeypatch.undo()
    assert_untouched(old)


def test_a_disk_without_room_is_found_before_any_work(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(old.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50))
    with pytest.raises(OutputError, match=r"needs 0\.0 MB, its disk has 0\.0 MB left; make room"):
        GgufWriter(old, {}, TENSORS).__enter__()
    assert_untouched(old)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are those of Unix")
def test_a_write_that_the_system_cuts_short(old: Path) -> None:
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
from smolrun.files.gguf_writer import GgufWriter, TensorInfo
from smolrun.quant.types import WeightType
with GgufWriter({str(old)!r}, {{}}, [TensorInfo("a", WeightType.F32, (1000,))]) as writer:
    writer.write(bytes(4000))
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
    )
    assert "OutputError" in done.stderr
    assert "File too large; write to a disk" in done.stderr
    assert_untouched(old)


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("nowhere/m.gguf", "make the folder first"),
        ("file/m.gguf", "name a file in a folder"),
        ("folder", "is a folder"),
    ]:
        with pytest.raises(OutputError, match=message):
            write(tmp_path / name, {}, TENSORS)
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OutputError, match="no regular file"):
            write(tmp_path / "pipe", {}, TENSORS)
    assert sorted(os.listdir(tmp_path))[:2] == ["file", "folder"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "m.gguf"
    link.symlink_to(tmp_path / "disk" / "real.gguf")
    write(link, {}, TENSORS)
    assert link.is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real.gguf"]
    assert math.prod(GgufFile.open(link).tensors["a"].shape) == 12
