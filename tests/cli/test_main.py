"""The entry: help, versions, exit codes, errors, the environment, and how fast it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import smolrun
from smolrun.cli.main import VERBS, main
from smolrun.errors import ContextLengthError, ModelFormatError, RequestError
from tests.cli.fakes import ENDLESS, environment, install
from tests.waiting import SECONDS

HEAVY = (
    "numpy", "tokenizers", "jinja2", "safetensors", "huggingface_hub", "rich", "prompt_toolkit",
    "smolrun._core",
)  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["rm", "--help"], ["ls"]])
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; from smolrun.cli.main import main; code = main(sys.argv[1:]); "
        f"print('loaded', code, sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment(HF_HOME=str(tmp_path), SMOLRUN_CACHE=str(tmp_path)),
        timeout=SECONDS,
    )
    assert done.stdout.splitlines()[-1] == "loaded 0 []", done.stderr


def test_version_loads_the_core_alone() -> None:
    script = (
        "import sys; from smolrun.cli.main import main; main(['--version']); "
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=SECONDS,
    )
    first, modules = done.stdout.splitlines()
    assert first.startswith(f"smolrun {smolrun.__version__} (")
    assert modules == "['smolrun._core']", done.stderr


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"usage: smolrun {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "did you mean smolrun show"),
        (["Why?"], "smolrun run 'Why?'"),
        (["-m", "x"], "flags come after a verb"),
        (["run", "--top-k", "x", "hi"], "--top-k: invalid int value: 'x'"),
        (["run", "--threads", "0", "hi"], "at least 1"),
        (["run", "--date", "tomorrow", "hi"], "YYYY-MM-DD"),
        (["run", "--frobnicate", "hi"], "unrecognized arguments: --frobnicate"),
        (["run", "--think", "--no-think", "hi"], "not allowed with"),
        (["run", "-f", "missing.txt"], "missing.txt: No such file"),
        (["run"], "there is no prompt"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelFormatError("a.gguf: broken"), 1, "error: a.gguf: broken\n"),
        (ContextLengthError(10, 5), 1, "the prompt has 10 tokens"),
        (RequestError("top_p: too large"), 2, "error: top_p: too large\n"),
        (MemoryError(), 1, "out of memory"),
        (OSError(28, "No space left", "/x"), 1, "error: /x: No space left\n"),
        (KeyError("x"), 1, "KeyError: 'x'; this is a bug in smolrun"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    code: int,
    message: str,
    model_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("smolrun.api.Model", fail)
    assert main(["run", model_file, "hi"]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    if not isinstance(error, KeyboardInterrupt):
        monkeypatch.setenv("SMOLRUN_DEBUG", "1")
        assert main(["run", model_file, "hi"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "smollm2-135", "hi"]) == 1
    assert "did you mean smollm2-135m" in capsys.readouterr().err
    assert main(["show", "missing.gguf"]) == 1
    assert "no file or folder missing.gguf" in capsys.readouterr().err


def test_flags_come_from_the_environment_and_win_over_it(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(monkeypatch, ("", "yes"))
    for name, value in {
        "TEMPERATURE": "0.5", "TOP_K": "7", "STOP": "END", "N_PREDICT": "9", "THINK": "0",
        "THREADS": "2", "SYSTEM": "Be brief.", "QUIET": "1", "MODEL": model_file,
    }.items():  # fmt: skip
        monkeypatch.setenv("SMOLRUN_" + name, value)
    assert main(["run", "--top-k", "3", "hello there"]) == 0
    call = fake.calls[0]
    assert (call["temperature"], call["top_k"], call["stop"]) == (0.5, 3, ["END"])
    assert (call["max_tokens"], call["think"]) == (9, False)
    assert [m["role"] for m in call["messages"]] == ["system", "user"]
    assert fake.options["threads"] == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "value"), [("TOP_K", "many"), ("QUIET", "perhaps"), ("COLOR", "green"), ("THINK", "?")]
)
def test_a_bad_value_in_the_environment_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"SMOLRUN_{name}", value)
    assert main(["run", "hi"]) == 2
    assert f"environment variable SMOLRUN_{name}" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "smolrun.cli.main", "run", str(tiny), "hi", *ENDLESS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(SECONDS) == 1
    assert "Broken" not in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors with a shell")
@pytest.mark.parametrize("arguments", ["doctor", "run {model} hi -n 1", "chat {model}"])
def test_closed_streams_are_no_error(arguments: str, tiny: Path) -> None:
    command = arguments.format(model=tiny)
    for closed in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            f'"{sys.executable}" -m smolrun.cli.main {command} {closed}',
            shell=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment(),
            timeout=SECONDS,
        )
        assert done.returncode == 0, (closed, done.stderr)
        assert "bug" not in done.stderr
