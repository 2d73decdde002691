"""A runner in the life of a process: forks, exits, threads that come and go."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

from smolrun.quant.types import WeightType
from tests.native.mappings import resident_of_size
from tests.native.models import Model, blocks_for, ints, run_sequence, small_config
from tests.package import SOURCE
from tests.waiting import SECONDS, joined, started

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = small_config()
TOKENS = ints(range(40))

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in an interpreter of its own, with a small model at hand."""
    preamble = """
        import threading, time, sys, os
        import numpy as np
        from smolrun.quant.types import WeightType
        from tests.native.models import Model, blocks_for, ints, run_sequence, small_config
        config = small_config(num_hidden_layers=8, no_rope_layers=None)
        model = Model.random(config, [WeightType.Q8_0])
        tokens = ints(range(100))
        def run(runner):
            return run_sequence(runner, config, tokens, blocks_for(100), 50)
    """
    path = os.pathsep.join((str(SOURCE), str(REPOSITORY)))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": path},
    )


@needs_fork
def test_a_forked_child_gets_an_error_and_may_build_its_own() -> None:
    model = Model.random(CONFIG, [WeightType.Q8_0])
    runner = model.runner(threads=3)
    expected = run_sequence(runner, CONFIG, TOKENS, blocks_for(40), 40)
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: what is tested
        child = os.fork()
    if child == 0:
        verdict = "no error"
        try:
            try:
                run_sequence(runner, CONFIG, TOKENS, blocks_for(40), 40)
            except RuntimeError as error:
                own = run_sequence(model.runner(threads=2), CONFIG, TOKENS, blocks_for(40), 40)
                verdict = f"{error}; own equal: {np.array_equal(own, expected)}"
            del runner
            gc.collect()
        except BaseException as error:
            verdict = repr(error)
        os.write(write_end, verdict.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answered, _, _ = select.select([pipe], [], [], SECONDS)
        if not answered:
            os.kill(child, signal.SIGKILL)
        verdict = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert "load the model after the fork" in verdict
    assert "own equal: True" in verdict
    assert np.array_equal(run_sequence(runner, CONFIG, TOKENS, blocks_for(40), 7), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_exit_while_a_daemon_thread_is_in_a_step(threads: int) -> None:
    for pause in ("0.0", "0.003", "0.03"):
        done = run_python(f"""
            runner = model.runner(threads={threads})
            def work():
                while True:
                    run(runner)
            threading.Thread(target=work, daemon=True).start()
            time.sleep(0.05 + {pause})
            print("leaving")
        """)
        assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_exit_with_a_runner_alive_and_a_step_in_an_exit_handler() -> None:
    done = run_python("""
        import atexit
        runner = model.runner(threads=2)
        atexit.register(lambda: print(np.isfinite(run(runner)).all()))
        sys.modules["keep"] = runner
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_an_interrupt_waits_for_the_step() -> None:
    done = run_python("""
        import signal
        runner = model.runner(threads=2)
        expected = run(runner)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        hits = []
        signal.signal(signal.SIGALRM, lambda *_: hits.append(threading.get_ident()))
        for _ in range(30):
            assert np.array_equal(run(runner), expected)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert hits and set(hits) == {threading.main_thread().ident}
        print("fine")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@needs_proc
def test_a_system_that_refuses_threads() -> None:
    done = run_python("""
        import resource
        runner = model.runner(threads=2)
        expected = run(runner)
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = taken + (128 << 20)  # a thread's stack takes 8 MiB of it
        threading.stack_size(0)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for build in (lambda: runner.set_threads(512), lambda: model.runner(threads=512)):
            try:
                build()
            except (RuntimeError, MemoryError) as error:
                print(type(error).__name__)
        assert runner.threads == 2
        assert np.array_equal(run(runner), expected)
    """)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
    assert "RuntimeError" in done.stdout


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise AssertionError(name)


@needs_proc
def test_runners_leave_neither_threads_nor_memory_behind() -> None:
    model = Model.random(CONFIG, [WeightType.F32, WeightType.Q4_K])

    def cycle(count: int) -> None:
        for _ in range(count):
            runner = model.runner(threads=4, kv_blocks=256)
            run_sequence(runner, CONFIG, TOKENS[:8], blocks_for(8), 8)
            runner.set_threads(2)
            run_sequence(runner, CONFIG, TOKENS[:8], blocks_for(8), 8)
            del runner

    cycle(20)
    gc.collect()
    threads, resident = status("Threads"), status("VmRSS")
    cycle(100)
    gc.collect()
    assert status("Threads") <= threads
    # AddressSanitizer holds freed memory back.
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        assert status("VmRSS") - resident < 8 * 1024  # KiB; one runner's scratch takes more


@needs_proc
def test_cache_memory_is_taken_as_it_is_used_and_given_back() -> None:
    config = small_config(
        hidden_size=32, intermediate_size=32, vocab_size=10, num_key_value_heads=8,
        num_hidden_layers=16, no_rope_layers=None,
    )  # fmt: skip
    runner = Model.random(config, [WeightType.F32]).runner(kv_blocks=100_000)
    assert runner.kv_block_bytes == 32 * config.kv_bytes_per_token
    size = runner.memory["kv_cache"]
    assert size == 100_000 * runner.kv_block_bytes
    tokens = ints(np.arange(640) % 10)
    # The scratch may share the mapping; its pages have been touched then.
    run_sequence(runner, config, tokens[:32], ints([99_999]), 32)
    before = resident_of_size(size)
    blocks = blocks_for(640, 1000)
    run_sequence(runner, config, tokens, blocks, 32)
    used = resident_of_size(size) - before
    # Pages of 2 MiB may reach past the first and the last block.
    assert 20 * runner.kv_block_bytes <= used <= 20 * runner.kv_block_bytes + (4 << 20)
    runner.release_blocks(blocks)
    assert resident_of_size(size) - before <= 4 << 20


def test_many_python_threads_with_runners_of_their_own() -> None:
    model = Model.random(CONFIG, [WeightType.Q8_0])
    expected = run_sequence(model.runner(), CONFIG, TOKENS, blocks_for(40), 40)
    equal = []

    def work() -> None:
        runner = model.runner(threads=2)
        for chunk in (40, 3, 11):
            found = run_sequence(runner, CONFIG, TOKENS, blocks_for(40), chunk)
            equal.append(np.array_equal(found, expected))

    joined([started(work) for _ in range(6)])
    assert equal == [True] * 18
