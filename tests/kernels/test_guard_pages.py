"""No kernel touches a byte outside its arrays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kernels.helpers import each_isa
from tests.waiting import SECONDS

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.guarded", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


@each_isa
def test_kernels_stay_inside_their_arrays(isa: str) -> None:
    result = run(isa)
    assert result.returncode == 0, result.stdout[-200:] + result.stderr[-2000:]
    assert result.stdout.endswith("done\n")


def test_the_guard_is_one() -> None:
    result = run("fault")
    assert result.returncode != 0
    assert "done" not in result.stdout
