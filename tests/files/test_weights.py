"""Weights on their way to the kernels: same numbers, one copy."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun.errors import ModelFormatError, ResourceError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.gguf import GgufFile
from smolrun.files.weights import WeightLoading
from smolrun.model.llama import build
from smolrun.model.random import random_weights
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.blocks import tensor_values
from tests.package import SOURCE
from tests.waiting import SECONDS

from .images import PROMPT, tiny_config, tiny_gguf, tiny_safetensors
from .loading import run

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MAKER = REPOSITORY / "benchmarks" / "make_random_model.py"


def tiny(tmp_path: Path) -> Checkpoint:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    return open_checkpoint(path)


def test_logits_of_a_file_equal_the_reference(tmp_path: Path) -> None:
    """Names, rows and types all came through: a swap of any two would show."""
    checkpoint = tiny(tmp_path)
    values = {name: tensor_values(tensor) for name, tensor in checkpoint.tensors.items()}
    n = len(PROMPT)
    expected = ReferenceRunner(build(checkpoint.config), values).step(PROMPT, range(n), [0] * n)
    found = run(checkpoint, PROMPT)
    error = np.square(found - expected).sum() / np.square(expected).sum()
    assert error < 1e-4  # activations are rounded before the quantized products


def test_vectors_are_float32_and_progress_reaches_the_end(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    steps: list[tuple[int, int]] = []
    with WeightLoading.from_file(checkpoint, build(checkpoint.config), 2) as loading:
        weights = loading.finish(lambda done, total: steps.append((done, total)))
    assert weights.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        weight = weights[name]
        if len(tensor.shape) == 1:
            assert isinstance(weight, np.ndarray)
            np.testing.assert_array_equal(weight, tensor_values(tensor))
        else:
            assert not isinstance(weight, np.ndarray)
            assert (weight.type, weight.rows, weight.columns) == (tensor.type, *tensor.shape)
    total = sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_a_load_that_is_given_up_leaves_no_thread(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    threads = set(threading.enumerate())
    for _ in range(20):
        with (
            pytest.raises(KeyboardInterrupt),
            WeightLoading.from_file(checkpoint, build(checkpoint.config), 4),
        ):
            raise KeyboardInterrupt
        assert set(threading.enumerate()) == threads
    assert run(checkpoint, PROMPT).any()


def test_weights_outlive_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny_safetensors().to_bytes())
    expected = run(open_checkpoint(path), PROMPT)
    checkpoint = open_checkpoint(path)
    kept = dict(checkpoint.tensors)
    found = run(checkpoint, PROMPT)
    checkpoint.close()
    np.testing.assert_array_equal(found, expected)
    assert kept["model.norm.weight"].data.any()


def test_a_header_of_any_length(tmp_path: Path) -> None:
    """Weights that start at an odd address give the same bits."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    logits = []
    for extra in range(5):
        image = tiny_safetensors()
        text = json.dumps(image.header).encode()
        image.text = text + b" " * (-len(text) % 8 + extra)
        path = tmp_path / f"{extra}.safetensors"
        path.write_bytes(image.to_bytes())
        logits.append(run(open_checkpoint(path), PROMPT))
    for one in logits[1:]:
        np.testing.assert_array_equal(one, logits[0])


def test_weights_that_lie_in_no_file(tmp_path: Path) -> None:
    config = tiny(tmp_path).config
    program = build(config)
    with WeightLoading.from_memory(random_weights(config), program, 1) as loading:
        weights = loading.finish()
    assert weights.keys() == program.weights.keys()


# -- memory -----------------------------------------------------------------------------------

MEASURE = """
import sys
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.weights import WeightLoading
from smolrun.model.llama import build
checkpoint = open_checkpoint(sys.argv[1], sys.argv[2])
with WeightLoading.from_file(checkpoint, build(checkpoint.config), 2) as loading:
    weights = loading.finish()
# Not ru_maxrss, which begins with what the parent process had.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak) * 1024)
"""


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers take memory of their own"
)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the peak")
@pytest.mark.parametrize(
    ("name", "arguments", "dtype", "growth"),
    [
        ("m.gguf", ["--preset", "SmolLM2-135M", "--type", "Q8_0"], "auto", 1),
        ("m", ["--preset", "SmolLM2-135M", "--layers", "12"], "auto", 1),
        ("m", ["--preset", "SmolLM2-135M", "--layers", "12"], "f16", 1),
        ("m", ["--preset", "SmolLM2-135M", "--layers", "4"], "f32", 2),
    ],
)
def test_memory_never_holds_a_weight_twice(
    name: str, arguments: list[str], dtype: str, growth: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run(
        [sys.executable, MAKER, path, *arguments], check=True, env=environment, timeout=SECONDS
    )
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, path, dtype],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    size = path.stat().st_size if path.is_file() else (path / "model.safetensors").stat().st_size
    assert size > 80 << 20  # so that a second copy would break the limit below
    assert int(measured.stdout) < growth * size + (80 << 20)


# -- failing calls ----------------------------------------------------------------------------


def refusing(code: int) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOMEM, ResourceError), (errno.ENODEV, ModelFormatError)]
)
def test_a_map_that_is_refused(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    descriptors = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", refusing(code))
        with pytest.raises(error, match=r"a\.gguf"):
            GgufFile.open(path)
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert GgufFile.open(path).tensors


def test_a_file_that_shrinks_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that counts is that of the descriptor that is mapped, and mmap checks it again."""
    path = tmp_path / "a.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    true_fstat = os.fstat

    def shrinking(descriptor: int) -> os.stat_result:
        status = true_fstat(descriptor)
        os.truncate(path, 100)
        return status

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", shrinking)
        with pytest.raises(ModelFormatError, match="changed while"):
            GgufFile.open(path)


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(tiny_gguf().to_bytes())
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny_gguf().to_bytes()[:-1])
    descriptors = set(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(path)
    for _ in range(3):
        with pytest.raises(ModelFormatError):
            open_checkpoint(bad)
    checkpoint.close()
    del checkpoint
    assert set(os.listdir("/proc/self/fd")) == descriptors
