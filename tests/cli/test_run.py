"""`smolrun run`: where prompts come from, and where answers, thinking and notes go."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli.main import main
from smolrun.cli.terminal import DIM, RESET
from tests.cli.fakes import Terminal, install, stdin_of


def stdout_as_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    return stream


@pytest.mark.parametrize(
    ("words", "stdin", "prompt"),
    [
        (["Why is the sky blue?"], b"", "Why is the sky blue?"),
        (["Why", "is", "it", "blue?"], b"", "Why is it blue?"),
        (["-p", "Why?"], b"", "Why?"),
        (["Summarize:"], b"some text\n", "Summarize:\n\nsome text"),
        ([], b"only stdin\n", "only stdin"),
        (["-f", "file.txt", "Read:"], b"", "Read:\n\nfrom a file"),
        (["-f", "-"], b"piped", "piped"),
        (["hello"], "ünï\r\n".encode(), "hello\n\nünï"),
        (["--temp", "0", "after flags"], b"", "after flags"),
        (["bad \udcff byte"], b"", "bad \ufffd byte"),
    ],
)
def test_prompts(
    words: list[str],
    stdin: bytes,
    prompt: str,
    model_file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("file.txt").write_text("from a file\n")
    monkeypatch.setattr("sys.stdin", stdin_of(stdin))
    fake = install(monkeypatch, ("", "yes"))
    for arguments in (["-m", model_file, *words], [model_file, *words]):
        monkeypatch.setattr("sys.stdin", stdin_of(stdin))
        assert main(["run", *arguments]) == 0
        assert capsys.readouterr().out == "yes\n"
    expected = [{"role": "user", "content": prompt}]
    assert [call["messages"] for call in fake.calls] == [expected, expected]


def test_stdin_that_is_not_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", stdin_of(b"ab\xff"))
    assert main(["run", "hi"]) == 2
    assert "stdin is not UTF-8 text (byte 2)" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="has no end")
def test_text_without_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("smolrun.cli.options.MAX_TEXT_BYTES", 1 << 20)
    assert main(["run", "hi", "-f", "/dev/zero"]) == 2
    assert "/dev/zero has more than 1 MiB" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", stdin_of(bytes((1 << 20) + 1)))
    assert main(["run", "hi"]) == 2
    assert "stdin has more than 1 MiB" in capsys.readouterr().err


def test_a_lone_word_is_a_prompt_for_the_default_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(monkeypatch, ("", "yes"))
    asked: list[str] = []

    def resolve(name: str, **_: Any) -> Path:
        asked.append(name)
        return Path(name)

    monkeypatch.setattr("smolrun.files.names.resolve", resolve)
    assert main(["run", "hello"]) == 0
    assert main(["run", "smollm3-3b:q4_k_m", "hello"]) == 0
    assert main(["run", "-hf", "user/repo:q8_0", "smollm3-3b"]) == 0
    assert asked == ["smollm2-135m", "smollm3-3b:q4_k_m", "user/repo:q8_0"]
    prompts = [call["messages"][0]["content"] for call in fake.calls]
    assert prompts == ["hello", "hello", "smollm3-3b"]


def test_flags_reach_the_model(model_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, ("", "yes"))
    flags = "-s Short. -n 5 -c 99 -t 3 --temp 0.1 --top-k 4 --top-p 0.5 --min-p 0.05 "
    flags += "--repeat-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --seed 11 "
    flags += "--stop A --stop B --think --date 2025-07-01 --dtype f32 --logit-bias 7-1.5 "
    flags += "--activations fast"
    assert main(["run", model_file, "hi", *flags.split()]) == 0
    call = fake.calls[0]
    assert call.pop("messages")[0] == {"role": "system", "content": "Short."}
    assert call.pop("date").isoformat() == "2025-07-01"
    assert call == {
        "think": True, "max_tokens": 5, "temperature": 0.1, "top_k": 4, "top_p": 0.5,
        "min_p": 0.05, "repeat_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
        "seed": 11, "stop": ["A", "B"], "logit_bias": {7: -1.5},
    }  # fmt: skip
    options = fake.options
    assert (options["context_size"], options["threads"], options["dtype"]) == (99, 3, "f32")
    assert options["activations"] == "fast"


def test_form_and_budget_reach_the_model(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(monkeypatch, ("", "yes"))
    Path("schema.json").write_text('{"type": "null"}')
    Path("rules.lark").write_text('start: "a"')
    for flags, expected in (
        (["-j", '{"type": "object"}'], {"response_format": {"type": "object"}}),
        (["--json-schema", "@schema.json"], {"response_format": {"type": "null"}}),
        (["--grammar", "@rules.lark"], {"grammar": 'start: "a"'}),
        (["--regex", "[ab]+"], {"regex": "[ab]+"}),
        (["--thinking-budget", "9"], {"thinking_budget": 9}),
        (["--reasoning-budget", "-1"], {"thinking_budget": -1}),
    ):
        assert main(["run", model_file, "hi", *flags]) == 0
        call = fake.calls.pop()
        assert {k: v for k, v in call.items() if k not in ("messages", "think", "date")} == expected
    assert main(["run", model_file, "hi", "--raw", "--regex", "x"]) == 0
    assert fake.calls.pop() == {"prompt": "hi", "regex": "x"}
    capsys.readouterr()
    for flags, problem in (
        (["-j", "{"], "--json-schema is not JSON"),
        (["-j", "[]"], "--json-schema: expected an object"),
        (["--grammar", "@missing"], "missing: No such file"),
        (["--regex", "a", "-j", "{}"], "not allowed with"),
        (["--raw", "--thinking-budget", "5"], "need a chat template"),
    ):
        assert main(["run", model_file, "hi", *flags]) == 2
        assert problem in capsys.readouterr().err


def test_minus_one_stands_for_the_default(model_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, ("", "yes"))
    assert main(["run", model_file, "hi", "-n", "-1", "--seed", "-1"]) == 0
    assert not {"max_tokens", "seed"} & set(fake.calls[0])


def test_a_pipe_gets_the_answer_alone(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, ("hm, |well", "The |answer\x1b[2J"))
    assert main(["run", model_file, "hi"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The answer\x1b[2J\n"
    note, thinking, statistics = captured.err.splitlines()
    assert note == "The context holds 1000 tokens: a test."
    assert thinking == "hm, well"
    assert statistics == (
        "12 prompt tokens (3 cached), 180/s · 7 tokens (2 thinking), 30.0/s · first after 0.05 s"
    )
    assert main(["run", model_file, "hi", "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("The answer\x1b[2J\n", "")


def test_a_terminal_shows_thinking_dim_and_no_control_characters(
    model_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = stdout_as_terminal(monkeypatch)
    install(monkeypatch, ("hm\x1b]0;title\x07|well", "\n\nThe |\x1b[2Janswer"))
    assert main(["run", model_file, "hi"]) == 0
    assert terminal.getvalue() == f"{DIM}hm]0;titlewell{RESET}\n\nThe [2Janswer\n"


@pytest.mark.parametrize("way", ["--color=off", "NO_COLOR", "TERM"])
def test_without_color(way: str, model_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stdout_as_terminal(monkeypatch)
    install(monkeypatch, ("hm", "answer"))
    if not way.startswith("-"):
        monkeypatch.setenv(way, "dumb")
    assert main(["run", model_file, "hi", *([way] if way.startswith("-") else [])]) == 0
    assert terminal.getvalue() == "hm\n\nanswer\n"


def test_hidden_thinking(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, ("secret", "answer"))
    assert main(["run", model_file, "hi", "--hide-thinking"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "answer\n"
    assert "secret" not in captured.err


def test_json(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, ("hm", "ünswer"))
    assert main(["run", model_file, "hi", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["text"], values["reasoning"], values["seed"]) == ("ünswer", "hm", 5)
    assert values["usage"]["reasoning_tokens"] == 2
    assert values["timings"]["predicted_per_second"] == pytest.approx(30)
    assert values["model"] == model_file


def test_an_interrupt_keeps_what_came_and_exits_with_130(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(monkeypatch, ("", "so far"))
    fake.on_start = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert main(["run", model_file, "hi"]) == 130
    captured = capsys.readouterr()
    assert captured.out == "so far\n"
    assert captured.err.rstrip().endswith("stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_model_without_a_template_continues_text(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(monkeypatch, ("", " blue"))
    fake.has_template = False
    assert main(["run", model_file, "The sky is"]) == 0
    captured = capsys.readouterr()
    assert fake.calls == [{"prompt": "The sky is"}]
    assert captured.out == " blue\n"
    assert "no chat template" in captured.err
    assert main(["run", model_file, "x", "-s", "y"]) == 2
    fake.has_template = True
    assert main(["run", model_file, "--raw", "x"]) == 0
    assert fake.calls[-1] == {"prompt": "x"}


def test_no_prompt_on_a_terminal_is_a_chat(
    model_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = stdout_as_terminal(monkeypatch)
    install(monkeypatch, ("", "hello"))
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("smolrun.cli.prompt.read_messages", lambda *_: iter(["hi", "/bye"]))
    assert main(["run", model_file]) == 0
    assert terminal.getvalue() == "hello\n"


def test_the_real_thing(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(tiny), "The sky", "-n", "8", "--seed", "4", "--temp", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "8 tokens" in first.err
    assert main([*arguments, "--json", "-t", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["usage"]["completion_tokens"] == 8
    assert first.out.rstrip("\n") == values["text"].rstrip("\n")
    assert main(["run", str(tiny), "hi", "--temp", "500"]) == 2
    assert "temperature" in capsys.readouterr().err
    assert main(["run", str(tiny), "long " * 90, "-c", "64"]) == 1
    assert "the context holds 64" in capsys.readouterr().err
