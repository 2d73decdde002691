"""Whole measurements of a small model, and what is printed of them."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun import Model
from smolrun.errors import ResourceError, SmolrunError
from smolrun.measure.bench import BATCH_STEPS, ModelReport, Plan, measure_model
from smolrun.measure.child import ChildOptions, first_answer, timed
from smolrun.measure.report import Report
from smolrun.measure.sequences import Sequences
from smolrun.measure.stamp import prompt_tokens
from smolrun.measure.tables import rich_console
from tests.api.tiny import make_folder
from tests.measure.support import RATES, FixedMeter, ceilings

PLAN = Plan(
    prompt_tokens=(40, 300),
    decode_tokens=(3,),
    depths=(0, 70),
    sequences=(1, 3),
    batch_depth=33,
    repetitions=2,
    start=False,
    profile=True,
    trace=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def measured(folder: Path) -> ModelReport:
    meter = FixedMeter()
    found = measure_model(folder, PLAN, meter)
    assert meter.calls == PLAN.repetitions + 1, "before every round"
    return found


def report_of(measured: ModelReport) -> Report:
    return Report("1.2.3", "A | CPU", ceilings(), 0.5, [measured])


def test_every_measurement_is_there(measured: ModelReport) -> None:
    assert [(row.name, row.tokens) for row in measured.rows] == [
        ("prefill 40", 40),
        ("prefill 300", 300),
        ("decode 3", 3),
        ("decode 3 at 70", 3),
        ("1 sequence: decode 3 at 33", 3),
        ("3 sequences: decode 3 at 33", 9),
    ]
    assert all(len(row.seconds.values) == PLAN.repetitions for row in measured.rows)
    assert measured.notes == []
    assert measured.stamp is not None
    assert measured.stamp.correct
    assert measured.first_token is measured.peak_bytes is None
    titles = [profile.title for profile in measured.profiles]
    assert titles == ["prefill of 40 tokens", "decode of a token", "decode of a token at 70"]


def test_json_has_a_fixed_shape(measured: ModelReport) -> None:
    found: dict[str, Any] = json.loads(report_of(measured).as_json())
    assert list(found) == [
        "format_version", "smolrun", "cpu_name", "load_average", "ceilings", "models",
    ]  # fmt: skip
    assert found["ceilings"]["rates"]["read"] == {
        "ceiling": 10e9, "median": 10e9, "min": 10e9, "max": 10e9, "samples": [10e9],
    }  # fmt: skip
    model = found["models"][0]
    assert model["name"] == "tiny"
    assert model["weight_types"].keys() == {"F32"}
    for row in model["rows"]:
        assert list(row) == [
            "name", "tokens", "tokens_per_second", "seconds", "bytes", "operations",
            "bytes_per_second", "operations_per_second", "of_ceiling", "bound",
        ]  # fmt: skip
        rate, seconds = row["tokens_per_second"], row["seconds"]
        assert rate["max"] == pytest.approx(row["tokens"] / seconds["min"])
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / seconds["median"])
        arithmetic = sum(count / RATES[name] for name, count in row["operations"].items())
        least = max(row["bytes"] / RATES["read"], arithmetic)
        assert row["of_ceiling"] == pytest.approx(least / seconds["median"])
    assert len(model["stamp"]["hash"]) == 16
    assert [len(profile["rows"]) for profile in model["profiles"]] == [8, 8, 8]


def test_profiles_hold_together(measured: ModelReport) -> None:
    for profile in measured.profiles:
        assert sum(row.seconds for row in profile.rows) == pytest.approx(profile.seconds)
        assert all(row.seconds > 0 for row in profile.rows)


def test_the_trace_has_a_prompt_and_tokens_after_it(measured: ModelReport) -> None:
    assert measured.trace is not None
    events: Any = measured.trace["traceEvents"]
    steps = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    assert [step["name"] for step in steps] == ["prefill"] * 2 + ["decode"] * 4
    assert [step["args"]["start"] for step in steps] == [0, 256, 300, 301, 302, 303]


def test_markdown_and_tables_say_the_same(measured: ModelReport) -> None:
    report = report_of(measured)
    markdown = report.as_markdown()
    out = io.StringIO()
    console = rich_console(out)
    console.width = 200
    report.print_tables(console)
    for text in (markdown, out.getvalue()):
        assert "smolrun 1.2.3, A | CPU, scalar, 2 threads" in text
        assert "3 sequences: decode 3 at 33" in text
        assert "Correctness: as the reference: 32 of 32" in text
        assert "linear_add o_proj" in text
    tables = [block for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    lines = markdown.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("**"):
            assert lines[number - 1] == lines[number + 1] == "", "else it belongs to the list"
    assert "kept this machine busy" in markdown
    quiet = dataclasses.replace(report, load_average=0.1).as_markdown()
    assert "busy" not in quiet
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_what_does_not_fit_is_left_out_and_said(folder: Path) -> None:
    plan = dataclasses.replace(
        PLAN, prompt_tokens=(600, 8), depths=(0, 511), sequences=(), repetitions=1,
        check=False, profile=False, trace=False,
    )  # fmt: skip
    found = measure_model(folder, plan, FixedMeter())
    assert [row.name for row in found.rows] == ["prefill 8", "decode 3"]
    assert found.notes == [
        "prefill 600 is left out: the model's context holds 512 tokens",
        "decode 3 at 511 is left out: the model's context holds 512 tokens",
    ]
    assert found.stamp is None
    assert found.trace is None


def test_a_check_that_memory_does_not_hold_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolrun.measure.bench.memory_needed", lambda program: 1 << 50)
    plan = Plan((8,), (0,), (0,), (), repetitions=1, start=False)
    found = measure_model(folder, plan, FixedMeter())
    assert found.stamp is None
    assert "the reference reading takes" in found.notes[0]


def test_the_choice_of_activations_is_passed_on_and_said(folder: Path) -> None:
    plan = Plan((8,), (0,), (0,), (), repetitions=1)
    found = measure_model(folder, plan, FixedMeter(), activations="exact")
    assert found.notes == ["activations: exact"]
    assert found.stamp is not None
    assert found.stamp.correct
    with pytest.raises(SmolrunError, match="activations"):
        first_answer(ChildOptions(str(folder), 1, "scalar", "auto", "int8"))


def test_zero_leaves_a_measurement_out(folder: Path) -> None:
    plan = Plan((0,), (0,), (0,), (), repetitions=1, start=False, check=False)
    assert measure_model(folder, plan, FixedMeter()).rows == []


def test_a_quick_plan_does_less() -> None:
    quick = Plan().quick()
    assert quick.prompt_tokens == (128,)
    assert quick.decode_tokens == (16,)
    assert quick.sequences == (1, 8)
    assert quick.repetitions == 2
    assert Plan(sequences=(5, 6)).quick().sequences == (5,)
    assert Plan(sequences=()).quick().sequences == ()
    assert Plan(profile=True, check=False).quick().profile
    assert not Plan(check=False).quick().check
    assert BATCH_STEPS >= 1


def test_the_time_of_a_process(folder: Path) -> None:
    found = first_answer(ChildOptions(str(folder), 1, "scalar", "auto"))
    assert found.first_token_seconds > 0
    assert found.peak_bytes > 10_000_000, "an interpreter with NumPy"


def test_lines_that_arrive_together_are_both_read() -> None:
    both = "print('first\\n{\"peak_bytes\": 5}', flush=True)"
    assert timed([sys.executable, "-c", both]).peak_bytes == 5


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SmolrunError, match=r"failed: .*nothing\.gguf"):
        first_answer(ChildOptions(str(tmp_path / "nothing.gguf"), 1, "scalar", "auto"))


def test_sequences_compute_what_the_model_does(folder: Path) -> None:
    with Model(folder, threads=2, context_size=512) as model:
        tokens = prompt_tokens(model.config.vocab_size, 300)
        expected = model.forward(tokens)[:, 0]
        model.clear_kv_cache()
        engine = model.loaded.engine
        with Sequences(engine, 1, 310) as sequences:
            assert sequences.prefill(tokens) > 0
            np.testing.assert_array_equal(sequences.logits(), expected)
            first = expected.argmax(axis=1).astype(np.int32)
            seconds, chosen = sequences.decode(first, 300, 5)
        assert seconds > 0
        answer = model.generate(tokens.tolist(), max_tokens=6, temperature=0, ignore_eos=True)
        text = model.detokenize([*first.tolist(), *chosen[0].tolist()])
        assert text.startswith(answer.text)
        assert model.statistics()["kv_blocks_held"] == 0


def test_sequences_decode_side_by_side_as_alone(folder: Path) -> None:
    with Model(folder, threads=2, context_size=512) as model:
        engine = model.loaded.engine
        first = prompt_tokens(model.config.vocab_size, 3)
        with Sequences(engine, 3, 40) as sequences:
            _, together = sequences.decode(first, 0, 10)
        for row, token in zip(together, first, strict=True):
            with Sequences(engine, 1, 40) as alone:
                _, expected = alone.decode(np.array([token], np.int32), 0, 10)
            np.testing.assert_array_equal(row, expected[0])


def test_sequences_that_do_not_fit_leave_nothing_behind(folder: Path) -> None:
    with Model(folder, threads=1, context_size=64, max_sequences=2) as model:
        engine = model.loaded.engine
        with pytest.raises(ResourceError, match="no room for 3 sequences of 64 tokens"):
            Sequences(engine, 3, 64)
        assert engine.pool.held == 0
        Sequences(engine, 2, 64).close()
        assert engine.pool.held == 0
