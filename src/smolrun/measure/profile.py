"""Where the time of a step goes, operation by operation; as a table and as a trace."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from smolrun.measure.ceilings import Ceilings
from smolrun.measure.sequences import Sequences
from smolrun.measure.work import StepShape, Work, WorkCounter, total
from smolrun.model.program import LinearAdd, Operation, Program

REST = "start and end of the step"


@dataclass(frozen=True)
class StepTimes:
    """One step, in nanoseconds."""

    begin: int  # on a clock of its own
    nanoseconds: int  # from the first operation's start until every thread was done
    ends: tuple[tuple[int, ...], ...]  # [thread][operation], after begin; -1: had no part in it
    shape: StepShape

    def operation_ends(self) -> list[int]:
        """When each operation was done by all; where nobody had a part, when the last one was."""
        ends, last = [], 0
        for parts in zip(*self.ends, strict=True):
            last = min(max(last, *parts), self.nanoseconds)
            ends.append(last)
        return ends

    def durations(self) -> list[int]:
        """Nanoseconds of each operation, from the end of the one before it; then of the rest."""
        ends = [0, *self.operation_ends(), self.nanoseconds]
        return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


@dataclass(frozen=True)
class ProfileRow:
    """The operations of one kind, all layers together, in the median step."""

    name: str
    count: int
    seconds: float
    share: float  # of the step
    work: Work

    def as_dict(self, ceilings: Ceilings) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "count": self.count,
            "seconds": self.seconds,
            "share": self.share,
            "bytes": self.work.bytes,
            "operations": self.work.total_operations,
            "of_ceiling": ceilings.share(self.work, self.seconds),
            "bound": ceilings.bound(self.work)[1],
        }


@dataclass(frozen=True)
class ProfileTable:
    """Where the time of one kind of step goes."""

    title: str
    steps: int  # that were looked at
    seconds: float  # of the rows together: medians, so close to the median step
    rows: tuple[ProfileRow, ...]

    def as_dict(self, ceilings: Ceilings) -> dict[str, object]:
        """For JSON."""
        return {
            "title": self.title,
            "steps": self.steps,
            "seconds": self.seconds,
            "rows": [row.as_dict(ceilings) for row in self.rows],
        }


def operation_name(operation: Operation) -> str:
    """What operations of one kind are counted under: their kind and, where it differs, weight."""
    if isinstance(operation, LinearAdd):
        return f"{operation.kind} {operation.weight.split('.')[-2]}"
    return operation.kind


def profile_table(
    title: str, program: Program, counter: WorkCounter, steps: Sequence[StepTimes]
) -> ProfileTable:
    """Sums steps of one shape up by kind of operation; ValueError where the shapes differ."""
    shape = steps[0].shape
    if any(step.shape != shape for step in steps):
        raise ValueError("a profile is of steps of one shape")
    names = [operation_name(operation) for operation in program.operations]
    times: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(steps))
    for number, step in enumerate(steps):
        for name, duration in zip([*names, REST], step.durations(), strict=True):
            times[name][number] += duration
    seconds = {name: statistics.median(values) / 1e9 for name, values in times.items()}
    whole = sum(seconds.values())
    rows = []
    for name in dict.fromkeys([*names, REST]):
        operations = [op for op in program.operations if operation_name(op) == name]
        work = total(counter.operation(operation, shape) for operation in operations)
        share = seconds[name] / whole if whole else 0.0
        rows.append(ProfileRow(name, len(operations), seconds[name], share, work))
    return ProfileTable(title, len(steps), whole, tuple(rows))


class _ProfiledRunner(Protocol):
    def set_profiling(self, on: bool) -> None: ...

    def profile(self) -> dict[str, Any]: ...


@contextmanager
def recording(sequences: Sequences) -> Iterator[list[StepTimes]]:
    """Notes the times of every step of `sequences` while it is open."""
    runner = cast(_ProfiledRunner, sequences.engine.runner)
    steps: list[StepTimes] = []

    def observe(begin: int, tokens: int, start: int, count: int, logits: bool) -> None:
        found = runner.profile()
        shape = StepShape(tokens, start, count, logits)
        ends = tuple(tuple(row) for row in found["ends"])
        steps.append(StepTimes(begin, found["nanoseconds"], ends, shape))

    sequences.engine.call(lambda: runner.set_profiling(True))
    sequences.observer = observe
    try:
        yield steps
    finally:
        sequences.observer = None
        sequences.engine.call(lambda: runner.set_profiling(False))


def chrome_trace(program: Program, steps: Sequence[StepTimes]) -> dict[str, object]:
    """The steps in the Trace Event Format, for chrome://tracing or ui.perfetto.dev.

    Rows: the steps, their operations, and each thread's part. A thread's part includes its wait for
    the others.
    """
    labels = [_trace_label(operation) for operation in program.operations]
    threads = max((len(step.ends) for step in steps), default=0)
    names = ["steps", "operations", *(f"thread {index}" for index in range(threads))]
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "smolrun"}}
    ]
    for row, name in enumerate(names):
        about = {"name": name}
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": about})
        order = {"sort_index": row}
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": row, "args": order})
    first = steps[0].begin if steps else 0
    for step in steps:
        shape = step.shape
        about_step: dict[str, object] = {
            "tokens": shape.tokens,
            "start": shape.start,
            "sequences": shape.sequences,
        }
        kind = "decode" if shape.tokens == 1 else "prefill"
        begin = step.begin - first
        events.append(_span(kind, 0, begin, begin + step.nanoseconds, about_step))
        for row, ends in enumerate([step.operation_ends(), *step.ends], start=1):
            last = 0
            for label, end in zip(labels, ends, strict=True):
                if end >= last and end >= 0:
                    if end > last:
                        events.append(_span(label, row, begin + last, begin + end, {}))
                    last = end
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _trace_label(operation: Operation) -> str:
    layer = getattr(operation, "layer", None)
    for name in ("weight", "gate"):
        parts = str(getattr(operation, name, "")).split(".")
        if layer is None and "layers" in parts:
            layer = parts[parts.index("layers") + 1]
    return operation_name(operation) + ("" if layer is None else f" {layer}")


def _span(name: str, row: int, begin: int, end: int, about: dict[str, object]) -> dict[str, object]:
    span: dict[str, object] = {"ph": "X", "name": name, "pid": 1, "tid": row}
    span |= {"ts": begin / 1000, "dur": (end - begin) / 1000}  # microseconds
    return span | ({"args": about} if about else {})
