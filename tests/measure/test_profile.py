"""Times of operations: sums, tables and traces, from times written down by hand."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from smolrun.measure.profile import REST, StepTimes, chrome_trace, operation_name, profile_table
from smolrun.measure.work import StepShape, WorkCounter
from smolrun.model.llama import build
from smolrun.quant.types import WeightType
from tests.measure.support import ceilings
from tests.models import small_config

PROGRAM = build(small_config(num_hidden_layers=2))
COUNTER = WorkCounter(PROGRAM, dict.fromkeys(PROGRAM.weights, WeightType.F32))
COUNT = len(PROGRAM.operations)
SHAPE = StepShape(4)


def even_step(each: int, begin: int = 0, rest: int = 7) -> StepTimes:
    """Two threads; the second is later by 1, and has no part in every third operation."""
    first = tuple((i + 1) * each for i in range(COUNT))
    second = tuple(-1 if i % 3 == 0 else (i + 1) * each + 1 for i in range(COUNT))
    last = max(first[-1], second[-1])
    return StepTimes(begin, last + rest, (first, second), SHAPE)


def test_durations_add_up_to_the_step() -> None:
    for step in (even_step(100), even_step(3, rest=0)):
        durations = step.durations()
        assert len(durations) == COUNT + 1
        assert sum(durations) == step.nanoseconds
        assert min(durations) >= 0


def test_an_operation_lasts_until_the_last_thread_is_done() -> None:
    ends = ((10, 25, -1, 40), (12, -1, -1, 50))
    step = StepTimes(0, 55, ends, SHAPE)
    assert step.operation_ends() == [12, 25, 25, 50]
    assert step.durations() == [12, 13, 0, 25, 5]


def test_a_clock_read_late_is_not_counted_twice() -> None:
    # The first thread was taken away between its last chunk of an operation and reading the clock.
    step = StepTimes(0, 100, ((80, -1, -1), (10, 20, 90)), SHAPE)
    assert step.operation_ends() == [80, 80, 90]
    assert sum(step.durations()) == 100


def test_a_table_sums_the_layers_up() -> None:
    steps = [even_step(each) for each in (1000, 2000, 90_000)]
    table = profile_table("decode", PROGRAM, COUNTER, steps)
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [
        "embed", "norm_qkv", "attention", "linear_add o_proj", "norm_swiglu",
        "linear_add down_proj", "norm_logits", REST,
    ]  # fmt: skip
    assert rows["norm_qkv"].count == 2
    assert rows[REST].count == 0
    assert rows["embed"].seconds == 2000 / 1e9, "of the median step"
    assert sum(row.count for row in table.rows) == COUNT
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert sum(row.seconds for row in table.rows) == pytest.approx(table.seconds)
    whole = COUNTER.step(SHAPE)
    assert sum(row.work.bytes for row in table.rows) == whole.bytes
    assert sum(row.work.total_operations for row in table.rows) == whole.total_operations


def test_a_table_as_json() -> None:
    table = profile_table("decode", PROGRAM, COUNTER, [even_step(1000)])
    found = json.loads(json.dumps(table.as_dict(ceilings())))
    rows = {row["name"]: row for row in found["rows"]}
    assert rows[REST]["of_ceiling"] is None
    qkv = rows["norm_qkv"]
    least = max(qkv["bytes"] / 10e9, qkv["operations"] / 100e9)
    assert qkv["of_ceiling"] == pytest.approx(least / qkv["seconds"])
    assert qkv["bound"] == "memory"


def test_steps_of_different_shapes_have_no_common_table() -> None:
    other = StepTimes(0, 1000, even_step(10).ends, StepShape(1))
    with pytest.raises(ValueError, match="one shape"):
        profile_table("mixed", PROGRAM, COUNTER, [even_step(10), other])


def test_names_tell_the_two_sums_of_a_layer_apart() -> None:
    names = [operation_name(operation) for operation in PROGRAM.operations]
    assert names.count("linear_add o_proj") == names.count("linear_add down_proj") == 2


def test_a_trace_is_valid_and_in_order() -> None:
    steps = [even_step(1000, begin=5_000_000), even_step(2000, begin=6_000_000)]
    trace: dict[str, Any] = json.loads(json.dumps(chrome_trace(PROGRAM, steps)))
    events = trace["traceEvents"]
    assert all({"ph", "name", "pid", "tid"} <= set(event) for event in events)
    names = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert names == {0: "steps", 1: "operations", 2: "thread 0", 3: "thread 1"}

    spans = [event for event in events if event["ph"] == "X"]
    rows = {row: [span for span in spans if span["tid"] == row] for row in names}
    assert [(span["ts"], span["dur"]) for span in rows[0]] == [
        (0.0, steps[0].nanoseconds / 1000),
        (1000.0, steps[1].nanoseconds / 1000),
    ]
    assert rows[0][0]["args"] == {"tokens": 4, "start": 0, "sequences": 1}
    assert len(rows[1]) == 2 * COUNT
    assert len(rows[3]) == 2 * sum(end >= 0 for end in steps[0].ends[1])
    for row in rows.values():
        assert all(span["dur"] > 0 for span in row)
        for before, after in itertools.pairwise(row):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    for span in spans:
        home = next(step for step in reversed(rows[0]) if step["ts"] <= span["ts"] + 1e-6)
        assert span["ts"] + span["dur"] <= home["ts"] + home["dur"] + 1e-6
    assert {"norm_qkv 0", "norm_qkv 1", "linear_add down_proj 1"} <= {s["name"] for s in rows[1]}


def test_a_trace_of_nothing() -> None:
    assert chrome_trace(PROGRAM, [])["displayTimeUnit"] == "ms"
