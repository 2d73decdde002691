"""Threads and memory, from trees of files as kernels and containers show them."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from smolrun import _core
from smolrun.engine.machine import (
    Limit,
    choose_threads,
    machine_report,
    memory_available,
    memory_limit,
    plan_kv_blocks,
)
from smolrun.errors import RequestError, ResourceError
from tests.native.models import small_config

GIB = 1 << 30
MEMINFO = "MemTotal:       67108864 kB\nMemFree: 100 kB\nMemAvailable:   33554432 kB\n"
V2_MOUNT = "30 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(group: str, files: dict[str, str], mount: str = V2_MOUNT) -> dict[str, str]:
    return {
        "proc/self/cgroup": f"0::{group}\n",
        "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/vda1 rw\nbroken line\n" + mount,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }


def v1(group: str, files: dict[str, str], top: str = "/") -> dict[str, str]:
    mounts = (
        f"31 30 0:27 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"32 30 0:28 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
    )
    groups = f"9:memory:{group}\n4:cpu,cpuacct:{group}\n1:name=systemd:/elsewhere\n"
    return {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": mounts,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"cpu_name": "", "flags": [], "physical_cores": 8, "affinity": 16}
    monkeypatch.setattr(_core, "machine", lambda: found)


@pytest.mark.parametrize(
    ("files", "threads", "why"),
    [
        ({}, 8, "physical cores 8; CPUs this process may run on 16"),
        (v2("/", {"cpu.max": "max 100000\n"}), 8, "physical cores"),
        (v2("/", {"cpu.max": "250000 100000\n"}), 2, "cgroup CPU quota (2.5 CPUs)"),
        (v2("/", {"cpu.max": "20000 100000\n"}), 1, "cgroup CPU quota (0.2 CPUs)"),
        (v2("/", {"cpu.max": "99 0\n"}), 8, "physical cores"),
        (v2("/", {"cpu.max": "nonsense\n"}), 8, "physical cores"),
        (v2("/", {"cpu.max": ""}), 8, "physical cores"),
        # A group above ours has the tighter quota; one beside ours does not matter.
        (
            v2(
                "/a/b",
                {
                    "a/b/cpu.max": "700000 100000",
                    "a/cpu.max": "300000 100000",
                    "cpu.max": "max 100000",
                    "c/cpu.max": "100000 100000",
                },
            ),
            3,
            "cgroup CPU quota (3 CPUs)",
        ),
        # Mounted from inside a container: the path is the host's, the mount is our group.
        (v2("/../outside", {"cpu.max": "400000 100000"}), 4, "quota (4 CPUs)"),
        (
            v2(
                "/docker/abc/x",
                {"cpu.max": "500000 100000", "x/cpu.max": "600000 100000"},
                V2_MOUNT.replace(" / /sys", " /docker/abc /sys"),
            ),
            5,
            "quota (5 CPUs)",
        ),
        (
            v1(
                "/docker/abc",
                {
                    "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n",
                    "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
                    "cpu,cpuacct/docker/cpu.cfs_quota_us": "150000\n",
                    "cpu,cpuacct/docker/cpu.cfs_period_us": "50000\n",
                },
            ),
            3,
            "quota (3 CPUs)",
        ),
        (
            v1(
                "/docker/abc",
                {
                    "cpu,cpuacct/cpu.cfs_quota_us": "600000\n",
                    "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                },
                top="/docker/abc",
            ),
            6,
            "quota (6 CPUs)",
        ),
    ],
)
def test_threads(tmp_path: Path, files: dict[str, str], threads: int, why: str) -> None:
    chosen = choose_threads(tree(tmp_path, files), {})
    assert chosen.value == threads
    assert why in chosen.why


@pytest.mark.parametrize(
    ("environ", "threads", "why"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3, "OMP_NUM_THREADS 3"),
        ({"OMP_NUM_THREADS": "2,4"}, 2, "OMP_NUM_THREADS 2"),
        ({"OMP_NUM_THREADS": "99"}, 8, "physical cores 8"),
        ({"OMP_NUM_THREADS": "many"}, 8, "physical cores 8"),
        ({"OMP_NUM_THREADS": "0"}, 8, "physical cores 8"),
        ({"SMOLRUN_THREADS": "12", "OMP_NUM_THREADS": "3"}, 12, "SMOLRUN_THREADS"),
        ({"SMOLRUN_THREADS": ""}, 8, "physical cores"),
    ],
)
def test_threads_that_are_asked_for(
    tmp_path: Path, environ: dict[str, str], threads: int, why: str
) -> None:
    chosen = choose_threads(tree(tmp_path, {}), environ)
    assert (chosen.value, why in chosen.why) == (threads, True)


def test_threads_that_can_not_be(tmp_path: Path) -> None:
    for text in ("0", "-1", "1025", "two", "1.5"):
        with pytest.raises(RequestError, match=f"SMOLRUN_THREADS is '{text}'; expected a whole"):
            choose_threads(tmp_path, {"SMOLRUN_THREADS": text})
    with pytest.raises(RequestError, match="threads is '0'"):
        choose_threads(tmp_path, {}, threads=0)
    assert choose_threads(tmp_path, {"SMOLRUN_THREADS": "9"}, threads=5).value == 5


@pytest.mark.parametrize(
    ("files", "limit", "limit_why", "available", "available_why"),
    [
        ({}, 64 * GIB, "physical memory", 32 * GIB, "available on this machine"),
        (
            v2("/", {"memory.max": "max\n", "memory.high": "max\n"}),
            64 * GIB,
            "physical memory",
            32 * GIB,
            "available on this machine",
        ),
        (
            v2(
                "/a/b",
                {
                    "a/b/memory.max": f"{20 * GIB}\n",
                    "a/memory.max": f"{8 * GIB}\n",
                    "a/memory.high": "max",
                    "a/memory.current": f"{5 * GIB}\n",
                    "a/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {2 * GIB}\n",
                    "memory.max": "max",
                },
            ),
            8 * GIB,
            "cgroup limit (/sys/fs/cgroup/a)",
            6 * GIB,
            "left of the cgroup limit (/sys/fs/cgroup/a)",
        ),
        (
            v2("/", {"memory.max": f"{8 * GIB}", "memory.high": f"{7 * GIB}"}),
            7 * GIB,
            "cgroup limit",
            7 * GIB,
            "left of the cgroup limit",
        ),
        (
            v2("/", {"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}"}),
            GIB,
            "cgroup limit",
            0,
            "left of the cgroup limit",
        ),
        (
            v1(
                "/docker/abc",
                {
                    "memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n",
                    "memory/docker/memory.limit_in_bytes": f"{4 * GIB}\n",
                    "memory/docker/memory.usage_in_bytes": f"{3 * GIB}\n",
                    "memory/docker/memory.stat": (
                        f"active_file 5\ntotal_active_file {GIB}\ntotal_inactive_file 0\n"
                    ),
                    "memory/memory.limit_in_bytes": "9223372036854771712\n",
                },
            ),
            4 * GIB,
            "cgroup limit (/sys/fs/cgroup/memory/docker)",
            2 * GIB,
            "left of the cgroup limit",
        ),
    ],
)
def test_memory(
    tmp_path: Path,
    files: dict[str, str],
    limit: int,
    limit_why: str,
    available: int,
    available_why: str,
) -> None:
    root = tree(tmp_path, files)
    most, now = memory_limit(root), memory_available(root)
    assert (most.value, now.value) == (limit, available)
    assert limit_why in most.why
    assert available_why in now.why


def test_the_limit_of_the_address_space_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 * GIB, resource.RLIM_INFINITY))
    pages = GIB // resource.getpagesize()
    root = tree(tmp_path, {"proc/self/statm": f"{pages} 5 5 5 0 5 0\n"})
    assert memory_limit(root).value == 3 * GIB
    assert memory_available(root).value == 2 * GIB
    assert "RLIMIT_AS" in memory_available(root).why


def test_a_machine_without_these_files(tmp_path: Path) -> None:
    assert choose_threads(tmp_path, {}).value == 8
    assert memory_limit(tmp_path).value > 1 << 20
    assert memory_available(tmp_path).value > 1 << 20


def test_the_report_says_what_was_chosen_and_why(tmp_path: Path) -> None:
    report = machine_report(tree(tmp_path, {}), {"SMOLRUN_ISA": "scalar", "SMOLRUN_THREADS": "2"})
    assert (report.isa, report.isa_why) == ("scalar", "SMOLRUN_ISA")
    assert (report.threads, report.threads_why) == (2, "SMOLRUN_THREADS")
    assert report.memory_limit == 64 * GIB
    assert machine_report(tmp_path, {}).isa == _core.default_isa()
    with pytest.raises(ResourceError, match="SMOLRUN_ISA is 'abacus'"):
        machine_report(tmp_path, {"SMOLRUN_ISA": "abacus"})


def test_the_report_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    report = machine_report(environ={})
    assert 1 <= report.threads <= report.affinity
    assert 0 < report.memory_available <= report.memory_limit


# --- the size of the KV cache

CONFIG = small_config(max_position_embeddings=4096)  # 512 bytes a token, 16 KiB a block
BLOCK = 32 * CONFIG.kv_bytes_per_token
HEADROOM = 64 << 20


@pytest.mark.parametrize(
    ("context_size", "sequences", "room_for", "expected", "why"),
    [
        (None, 1, 10_000, (4096, 128), "the model's own limit"),
        (None, 4, 10_000, (4096, 512), "the model's own limit"),
        (None, 4, 300, (4096, 300), "the model's own limit"),
        (None, 4, 127, (3840, 127), "what fits in 66 MiB (a test); the model allows 4096"),
        (None, 1, 8, (256, 8), "what fits"),
        (1000, 1, 32, (1000, 32), "asked for"),
        (1, 1, 10, (1, 1), "asked for"),
        (4096, 2, 256, (4096, 256), "asked for"),
    ],
)
def test_the_pool_holds_what_memory_allows(
    context_size: int | None,
    sequences: int,
    room_for: int,
    expected: tuple[int, int],
    why: str,
) -> None:
    available = Limit(HEADROOM + room_for * BLOCK, "a test")
    plan = plan_kv_blocks(CONFIG, context_size, sequences=sequences, available=available)
    assert (plan.context_size, plan.blocks) == expected
    assert why in plan.why
    assert plan.blocks * BLOCK + HEADROOM <= available.value


def test_a_pool_that_does_not_fit() -> None:
    message = r"KV cache of 4096 tokens takes 2 MiB.* 66 MiB .*\(a test\).* fits is 3840 tokens"
    with pytest.raises(ResourceError, match=message):
        plan_kv_blocks(CONFIG, 4096, available=Limit(HEADROOM + 127 * BLOCK, "a test"))
    for too_little in (0, HEADROOM, HEADROOM + 7 * BLOCK):
        with pytest.raises(ResourceError, match="largest context that fits is 0 tokens"):
            plan_kv_blocks(CONFIG, available=Limit(too_little, "a test"))
    for size in (0, -1, 4097):
        with pytest.raises(RequestError, match=f"context size is {size}; .* 1 to 4096"):
            plan_kv_blocks(CONFIG, size, available=Limit(GIB, "a test"))
