"""The team of threads under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.waiting import SECONDS

REPOSITORY = Path(__file__).resolve().parents[2]
CORE = REPOSITORY / "src" / "core"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", ["", "-fsanitize=thread"])
def test_phases_keep_their_order(tmp_path: Path, sanitizer: str) -> None:
    assert COMPILER is not None
    # The sanitizers that a test run is preloaded with do not go together with this one.
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    program = tmp_path / "team_stress"
    sources = [str(Path(__file__).with_name("team_stress.cpp")), str(CORE / "threads.cpp")]
    command = [COMPILER, "-std=c++20", "-O1", "-g", f"-I{CORE}", *sources, "-pthread"]
    built = subprocess.run(
        [*command, *([sanitizer] if sanitizer else []), "-o", str(program)],
        capture_output=True,
        text=True,
        env=environ,
        timeout=2 * SECONDS,
    )
    if sanitizer and "cannot find" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run(
        [program, "10"], capture_output=True, text=True, env=environ, timeout=2 * SECONDS
    )
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr
