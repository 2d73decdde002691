"""Peak memory of a whole process: the file, the KV cache in use, and little else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package import SOURCE
from tests.waiting import SECONDS

MAKER = Path(__file__).resolve().parents[2] / "benchmarks" / "make_random_model.py"
ANSWER = """
import sys
from smolrun import Model

with Model(sys.argv[1], threads=2) as model:
    result = model.generate("Hello there. " * 30, max_tokens=8, ignore_eos=True)
    model.chat("<|im_end|> is text here", max_tokens=1)
    kv = model.config.kv_bytes_per_token * 32 * (model.statistics()["kv_blocks_cached"] + 2)
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(peak * 1024 - kv)
"""

CONVERT = """
import sys
from smolrun import convert

convert(sys.argv[1], sys.argv[2], dtype="f16")
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="shadow memory counts too")
@pytest.mark.parametrize(
    ("arguments", "beside"),
    [
        (["--preset", "SmolLM2-135M", "--type", "Q8_0"], 100 << 20),
        (["--preset", "SmolLM3-3B", "--layers", "1", "--type", "Q4_K_M"], 200 << 20),
    ],
    ids=["49k vocabulary", "128k vocabulary"],
)
def test_one_copy_of_everything(arguments: list[str], beside: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    path = tmp_path / "m.gguf"
    subprocess.run(
        [sys.executable, MAKER, path, *arguments], check=True, env=environment, timeout=SECONDS
    )
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, path],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert int(done.stdout) - path.stat().st_size < beside


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="shadow memory counts too")
@pytest.mark.parametrize(("source", "target"), [("m", "m.gguf"), ("m.gguf", "m")])
def test_converting_holds_a_piece_of_the_weights(source: str, target: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    shape = ["--preset", "SmolLM2-360M", "--layers", "4", "--type", "F32"]  # 0.35 GB
    made = [sys.executable, str(MAKER), str(tmp_path / source), *shape]
    subprocess.run(made, check=True, env=environment, timeout=SECONDS)
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, tmp_path / source, tmp_path / target],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert int(done.stdout) < 200 << 20
