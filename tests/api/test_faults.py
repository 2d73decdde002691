"""Loading while the system refuses: the n-th call fails, or memory ends. Always an exception, and
the process goes on."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolrun import Model, SmolrunError
from tests.package import SOURCE
from tests.waiting import SECONDS

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


def answer(folder: Path) -> tuple[int, ...]:
    with Model(folder, threads=1, context_size=128) as model:
        return model.chat("hi", max_tokens=2, temperature=0).token_ids


@needs_proc
@pytest.mark.parametrize(
    ("module", "name"), [(os, "open"), (os, "fstat"), (os, "fdopen"), (mmap, "mmap")]
)
def test_the_nth_call_fails(
    module: Any, name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(tiny_folder)
    true_call = getattr(module, name)
    for nth in range(1000):
        calls = 0

        def failing(*arguments: Any, _nth: int = nth, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == _nth + 1:
                raise OSError(5, os.strerror(5))
            return true_call(*arguments, **options)

        gc.collect()
        descriptors = set(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patched:
            patched.setattr(module, name, failing)
            try:
                found = answer(tiny_folder)
            except (SmolrunError, OSError):
                assert calls == nth + 1
                found = ()
        gc.collect()
        assert set(os.listdir("/proc/self/fd")) == descriptors
        if calls <= nth:
            break
        assert found in ((), expected)
    assert nth > 0
    assert found == answer(tiny_folder) == expected


SHRINKING = """
import gc, resource, sys
from smolrun import Model

def answer():
    with Model(sys.argv[1], threads=2, context_size=256) as model:
        return model.generate([1, 2, 3] * 20, max_tokens=4, temperature=0).token_ids

expected, refused, more = answer(), 0, 0
found = None
while found != expected:
    gc.collect()
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, resource.RLIM_INFINITY))
    try:
        found = answer()
        assert found == expected
    except MemoryError:  # ResourceError is one
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    more += 3 << 20
assert answer() == expected
print(refused > 10)
"""


@needs_proc
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="reserves address space")
def test_memory_ends_anywhere(tiny_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHRINKING, tiny_folder],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        timeout=2 * SECONDS,  # it loads dozens of times
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
