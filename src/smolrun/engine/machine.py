"""What this machine lets us use: processor cores, memory, and who says so.

In a container the numbers that the system shows are the host's; the real limits stand in the
cgroup files, of version 1 or 2, of our own group and of every group above it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from smolrun import _core
from smolrun.engine.native import BLOCK_TOKENS, resolve_isa
from smolrun.errors import RequestError, ResourceError

if TYPE_CHECKING:
    from smolrun.model.config import ModelConfig

MAX_THREADS = 1024
_LEAST_READ, _MOST_READ = 1 << 20, 256 << 20
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number close to 2**63


@dataclass(frozen=True)
class Limit:
    """A number, and the reason why it is that one."""

    value: int
    why: str


@dataclass(frozen=True)
class MachineReport:
    """What smolrun found and chose; `smolrun doctor` prints it."""

    cpu_name: str
    flags: tuple[str, ...]
    isas: tuple[str, ...]  # instruction sets this CPU runs, slowest first
    isa: str  # the one in use
    isa_why: str
    physical_cores: int  # among the CPUs this process may run on
    affinity: int  # logical CPUs this process may run on
    threads: int
    threads_why: str
    memory_limit: int  # bytes that this process could ever have
    memory_limit_why: str
    memory_available: int  # bytes that it can still take now
    memory_available_why: str


def machine_report(
    root: Path = Path("/"), environ: Mapping[str, str] | None = None
) -> MachineReport:
    """Everything in one: see `choose_threads`, `memory_limit`, `memory_available`.

    `root` is where /proc and /sys are looked for. RequestError and ResourceError where SMOLRUN_ISA
    or SMOLRUN_THREADS can not be honoured.
    """
    environ = os.environ if environ is None else environ
    found = _core.machine()
    threads = choose_threads(root, environ)
    limit = memory_limit(root)
    available = memory_available(root)
    isas = tuple(_core.isas())
    forced = environ.get("SMOLRUN_ISA")
    return MachineReport(
        cpu_name=found["cpu_name"],
        flags=tuple(found["flags"]),
        isas=isas,
        isa=resolve_isa(environ=environ),
        isa_why="SMOLRUN_ISA" if forced else "the fastest that this CPU runs",
        physical_cores=found["physical_cores"],
        affinity=found["affinity"],
        threads=threads.value,
        threads_why=threads.why,
        memory_limit=limit.value,
        memory_limit_why=limit.why,
        memory_available=available.value,
        memory_available_why=available.why,
    )


# --- threads


def measured_ceilings(isa: str, threads: int, samples: int) -> dict[str, list[float]]:
    """Rates that this machine reaches at most; see `_core.ceilings`.

    Reads go over 256 MiB, or over a quarter of the memory that is left.
    """
    read_bytes = max(_LEAST_READ, min(_MOST_READ, memory_available().value // 4))
    return _core.ceilings(isa, threads, samples, read_bytes)


def available_cpus() -> int:
    """CPUs this process may run on."""
    return int(_core.machine()["affinity"])


def choose_threads(
    root: Path = Path("/"), environ: Mapping[str, str] | None = None, threads: int | None = None
) -> Limit:
    """How many threads to compute with.

    `threads`, else SMOLRUN_THREADS, else the least of the CPUs this process may run on, their
    physical cores, the cgroups' CPU quota and OMP_NUM_THREADS. RequestError for a number that is
    not 1 to 1024.
    """
    environ = os.environ if environ is None else environ
    if threads is not None:
        return Limit(_checked_threads("threads", str(threads)), "asked for")
    forced = environ.get("SMOLRUN_THREADS")
    if forced:
        return Limit(_checked_threads("SMOLRUN_THREADS", forced), "SMOLRUN_THREADS")

    found = _core.machine()
    limits = [
        Limit(found["physical_cores"], "physical cores"),
        Limit(available_cpus(), "CPUs this process may run on"),
    ]
    quota = _cpu_quota(root)
    if quota is not None:
        limits.append(quota)
    openmp = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if openmp.isdecimal() and int(openmp) > 0:
        limits.append(Limit(int(openmp), "OMP_NUM_THREADS"))
    least = min(limits, key=lambda limit: limit.value)
    rest = ", ".join(f"{limit.why} {limit.value}" for limit in limits if limit is not least)
    return Limit(max(1, min(least.value, MAX_THREADS)), f"{least.why} {least.value}; {rest}")


def _checked_threads(name: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_THREADS:
        raise RequestError(f"{name} is {text!r}; expected a whole number, 1 to {MAX_THREADS}")
    return value


def _cpu_quota(root: Path) -> Limit | None:
    """CPUs that the cgroups grant, rounded down but at least 1; None without a quota."""
    quotas = []
    for version, folder in _cgroup_folders(root, "cpu"):
        if version == 2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        # "max", "-1" and a file that is not there all mean: no quota.
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    if not quotas:
        return None
    least = min(quotas)
    return Limit(max(1, int(least)), f"cgroup CPU quota ({least:g} CPUs)")


# --- memory


def memory_limit(root: Path = Path("/")) -> Limit:
    """Bytes that this process could ever have: physical memory, cgroups or RLIMIT_AS."""
    limits = [_physical_memory(root)]
    for version, folder in _cgroup_folders(root, "memory"):
        value = _cgroup_memory(version, folder)
        if value is not None:
            limits.append(Limit(value, f"cgroup limit ({_shown(root, folder)})"))
    address_space = _address_space_limit()
    if address_space is not None:
        limits.append(Limit(address_space, "RLIMIT_AS (ulimit -v)"))
    return min(limits, key=lambda limit: limit.value)


def memory_available(root: Path = Path("/")) -> Limit:
    """Bytes that this process can take now; pages of files, which can be dropped, count as free."""
    limits = []
    free = _meminfo(root).get("MemAvailable")
    if free is not None:
        limits.append(Limit(free, "memory available on this machine"))
    else:
        limits.append(_physical_memory(root))
    for version, folder in _cgroup_folders(root, "memory"):
        value = _cgroup_memory(version, folder)
        if value is not None:
            used = _cgroup_used(version, folder)
            limits.append(
                Limit(max(0, value - used), f"left of the cgroup limit ({_shown(root, folder)})")
            )
    address_space = _address_space_limit()
    if address_space is not None:
        mapped = _number(_read(root / "proc/self/statm").partition(" ")[0]) or 0
        left = address_space - mapped * os.sysconf("SC_PAGE_SIZE")
        limits.append(Limit(max(0, left), "left of RLIMIT_AS (ulimit -v)"))
    return min(limits, key=lambda limit: limit.value)


def _physical_memory(root: Path) -> Limit:
    total = _meminfo(root).get("MemTotal")
    if total is None:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Limit(total, "physical memory")


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name, from lines such as `MemTotal:  24576 kB`."""
    sizes = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        number = _number(rest.split()[0] if rest.split() else "")
        if number is not None:
            sizes[name] = number * 1024
    return sizes


def _address_space_limit() -> int | None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY or soft >= _UNLIMITED else soft


def _cgroup_memory(version: int, folder: Path) -> int | None:
    """The limit of one group in bytes. Above `memory.high` the kernel slows a group to a crawl."""
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    values = [_number(_read(folder / name)) for name in names]
    limits = [value for value in values if value is not None and value < _UNLIMITED]
    return min(limits, default=None)


def _cgroup_used(version: int, folder: Path) -> int:
    """Bytes a group holds and can not give back: all but the pages of files."""
    used = _number(_read(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")))
    stat = {}
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        stat[name] = _number(value) or 0
    prefix = "" if version == 2 else "total_"
    files = stat.get(prefix + "active_file", 0) + stat.get(prefix + "inactive_file", 0)
    return max(0, (used or 0) - files)


# --- KV cache

# What is left free beside the cache: the scratch of a step, logits, the interpreter's own growth.
_HEADROOM = 64 << 20
_CONTEXT_STEP = 256  # tokens; a context that had to be cut is a multiple of it


@dataclass(frozen=True)
class KvPlan:
    """How large a KV cache is, and the reason why."""

    context_size: int  # tokens that one sequence may have
    blocks: int  # of 32 tokens, in the pool
    why: str


def plan_kv_blocks(
    config: ModelConfig,
    context_size: int | None = None,
    *,
    sequences: int = 1,
    available: Limit | None = None,
) -> KvPlan:
    """Sizes the pool so that it can fill up without running out of memory.

    context_size: tokens of one sequence; None for as many as the model allows and memory holds.
    sequences: how many whole contexts to make room for, if memory allows; one is the least.
    available: `memory_available()`, taken when the weights are in memory.
    RequestError for a context that is not 1 to the model's own limit; ResourceError, saying what
    would fit, where one whole context does not.
    """
    most = config.max_position_embeddings
    if context_size is not None and not 1 <= context_size <= most:
        raise RequestError(
            f"the context size is {context_size}; this model takes 1 to {most} tokens"
        )
    available = memory_available() if available is None else available
    block_bytes = BLOCK_TOKENS * config.kv_bytes_per_token
    fitting = max(0, available.value - _HEADROOM) // block_bytes
    wanted = context_size or most
    blocks = -(-wanted // BLOCK_TOKENS)
    why = "asked for" if context_size else "the model's own limit"
    if blocks > fitting:
        largest = fitting * BLOCK_TOKENS // _CONTEXT_STEP * _CONTEXT_STEP
        if context_size or largest == 0:
            raise ResourceError(
                f"a KV cache of {wanted} tokens takes {_mib(blocks * block_bytes)}, and "
                f"{_mib(_HEADROOM)} must stay free beside it; {_mib(available.value)} are to be "
                f"had ({available.why}). The largest context that fits is {largest} tokens"
            )
        wanted, blocks = largest, -(-largest // BLOCK_TOKENS)
        why = f"what fits in {_mib(available.value)} ({available.why}); the model allows {most}"
    return KvPlan(wanted, min(fitting, blocks * max(1, sequences)), why)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


# --- cgroup files


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of our group and of those above it, as far as they are mounted here.

    /proc/self/cgroup names the group, as `0::/path` (version 2) or `4:cpu,cpuacct:/path`;
    /proc/self/mountinfo says where the hierarchies are mounted, and which group is at the top.
    """
    groups: dict[int, PurePosixPath] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (line.split(":", 2) + ["", ""])[:3]
        if not names:
            groups[2] = PurePosixPath(path)
        elif controller in names.split(","):
            groups[1] = PurePosixPath(path)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version is None or version not in groups:
            continue
        if version == 1 and controller not in kind[2].split(","):
            continue
        top, mount = PurePosixPath(fields[3]), root / fields[4].lstrip("/")
        group = groups[version]
        # In a container without its own cgroup namespace the path is the host's; what is mounted
        # at the top is then our own group.
        inside = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
        # A path out of our namespace ("/../other") can not be followed either.
        parts = () if ".." in inside.parts else inside.parts
        for depth in range(len(parts), -1, -1):
            yield version, mount.joinpath(*parts[:depth])


def _shown(root: Path, folder: Path) -> str:
    return "/" + folder.relative_to(root).as_posix()


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
