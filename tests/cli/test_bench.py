"""`smolrun bench`: flags, forms of output, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolrun.cli.bench import counts
from smolrun.cli.main import main

SMALL = ["-p", "8", "-n", "2", "-d", "0", "--sequences", "2", "-r", "1", "-t", "1", "--no-start"]


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"read": [1e10], "f32": [1e11], "int8": [4e11]}
    monkeypatch.setattr("smolrun.engine.machine.measured_ceilings", lambda *_: rates)


def test_markdown_where_nobody_looks(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "| prefill 8 |" in out
    assert "1 thread" in out
    assert "Correctness: as the reference" in out


def test_json_and_a_trace(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    options = ["--json", "--no-check", "--profile", "--trace", str(trace)]
    assert main(["bench", "-m", str(tiny), *SMALL, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ceilings"]["threads"] == 1
    model = found["models"][0]
    assert [row["name"] for row in model["rows"]] == [
        "prefill 8", "decode 2", "2 sequences: decode 2 at 128",
    ]  # fmt: skip
    assert model["stamp"] is None
    assert len(model["profiles"]) == 2
    assert json.loads(trace.read_text())["traceEvents"]


def test_models_stand_one_after_the_other(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny), str(tiny), *SMALL, "--quick", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2


def test_a_wrong_model_fails(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolrun.measure.stamp.TOLERANCE", -1.0)
    assert main(["bench", str(tiny), *SMALL]) == 1
    assert "NOT as the reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-p", "x"], "-p"),
        (["-n", "-3"], "-n"),
        (["-r", "0"], "at least 1"),
        (["--json", "--markdown"], "not allowed"),
        (["--trace", "t.json", "a.gguf", "b.gguf"], "one model"),
    ],
)
def test_wrong_usage(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert words in capsys.readouterr().err


def test_counts() -> None:
    assert counts("0,4096,0") == (0, 4096)
    assert counts("7") == (7,)
