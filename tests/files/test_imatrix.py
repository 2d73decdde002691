"""Files of importance, there and back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from smolrun.errors import ModelFormatError, ModelNotFoundError
from smolrun.files.gguf_writer import GgufWriter, TensorInfo, TypedValue
from smolrun.files.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from smolrun.quant.types import WeightType

SUMS = {
    "blk.0.attn_q.weight": np.array([1, 2, 3, 0], np.float32),
    "output.weight": np.array([5, 6], np.float32),
}
MATRIX = ImportanceMatrix(SUMS, {"blk.0.attn_q.weight": 4, "output.weight": 0}, ("a.txt",), 3, 512)


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_imatrix(path, MATRIX)
    found = read_imatrix(path)
    assert (found.counts, found.datasets) == (MATRIX.counts, MATRIX.datasets)
    assert (found.chunk_count, found.chunk_size) == (3, 512)
    for name, sums in SUMS.items():
        np.testing.assert_array_equal(found.sums[name], sums)


def test_as_llama_cpp_lays_it_out(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_imatrix(path, MATRIX)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert {t.name: list(t.shape) for t in reader.tensors} == {
        "blk.0.attn_q.weight.counts": [1, 1],
        "blk.0.attn_q.weight.in_sum2": [4, 1],
        "output.weight.counts": [1, 1],
        "output.weight.in_sum2": [2, 1],
    }


def test_importance_is_the_mean_and_never_nothing() -> None:
    found = MATRIX.importance("blk.0.attn_q.weight")
    assert found is not None
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 0.375e-4], rtol=1e-6)
    assert MATRIX.importance("output.weight") is None  # the text did not reach it
    assert MATRIX.importance("other.weight") is None


@pytest.mark.parametrize(
    ("kind", "tensors", "words"),
    [
        ("model", {"a.in_sum2": [1.0], "a.counts": [1.0]}, "expected 'imatrix', found 'model'"),
        ("imatrix", {"a.weight": [1.0]}, "holds no .in_sum2"),
        ("imatrix", {"a.in_sum2": [1.0]}, "has no a.counts beside it"),
        ("imatrix", {"a.in_sum2": [1.0], "a.counts": [1.0, 2.0]}, "expected 1 number, found 2"),
        ("imatrix", {"a.in_sum2": [-1.0], "a.counts": [1.0]}, "negative or not finite"),
        ("imatrix", {"a.in_sum2": [1.0], "a.counts": [float("nan")]}, "negative or not finite"),
    ],
)
def test_refused(tmp_path: Path, kind: str, tensors: dict[str, list[float]], words: str) -> None:
    path = tmp_path / "x.gguf"
    infos = [TensorInfo(n, WeightType.F32, (1, len(v))) for n, v in tensors.items()]
    with GgufWriter(path, {"general.type": TypedValue("string", kind)}, infos) as writer:
        for values in tensors.values():
            writer.write(np.array(values, np.float32))
    with pytest.raises(ModelFormatError, match=words):
        read_imatrix(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_imatrix(tmp_path / "none.gguf")
