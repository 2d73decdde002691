"""`smolrun chat`: commands, messages of many lines, saving, and Ctrl-C in a real terminal."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from smolrun.cli import chat
from smolrun.cli.chat import COMMANDS, Chat, Leave, is_open, unquoted
from smolrun.cli.main import main
from smolrun.cli.session import Session
from smolrun.cli.terminal import Console
from smolrun.errors import ContextLengthError, RequestError
from tests.cli.fakes import ENDLESS, FakeModel, environment, install, stdin_of
from tests.waiting import SECONDS, eventually


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    return install(monkeypatch, ("", "one"), ("", "two"), ("", "three"), ("", "more"))()


@pytest.fixture
def talk(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> Chat:
    return Chat(Session(model), Console())  # type: ignore[arg-type]


def contents(model: FakeModel) -> list[str]:
    return [message["content"] for message in model.calls[-1]["messages"]]


def test_a_conversation_grows(talk: Chat, model: FakeModel) -> None:
    talk.turn("a")
    talk.turn("b")
    assert contents(model) == ["a", "one", "b"]
    talk.turn("/undo")
    talk.turn("c")
    assert contents(model) == ["a", "one", "c"]
    talk.turn("/regen")
    assert contents(model) == ["a", "one", "c"]
    talk.turn("/clear")
    talk.turn("d")
    assert contents(model) == ["d"]


def test_system_prompt_and_thinking(talk: Chat, model: FakeModel) -> None:
    talk.turn("/system Be kind.")
    talk.turn("/think")
    talk.turn("a")
    assert contents(model) == ["Be kind.", "a"]
    assert model.calls[-1]["think"] is True
    talk.turn("/nothink")
    talk.turn("/system -")
    talk.turn("b")
    assert contents(model) == ["a", "one", "b"]
    assert model.calls[-1]["think"] is False


def test_a_budget_of_thinking(
    talk: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(command: str) -> tuple[object, object]:
        talk.turn(command)
        talk.turn("a")
        return model.calls[-1]["think"], model.calls[-1].get("thinking_budget")

    assert asked("/budget 50") == (True, 50)
    assert asked("/budget -1") == (True, -1)
    assert asked("/think") == (True, None)
    assert asked("/budget 0") == (False, None)
    talk.turn("/budget 7")
    talk.turn("/budget")
    assert "thinking: on, at most 7 tokens" in capsys.readouterr().err
    for wrong in ("x", "-2"):
        talk.turn(f"/budget {wrong}")
        assert "budget: expected" in capsys.readouterr().err
    assert talk.session.budget == 7


def test_thinking_that_the_model_lacks(
    talk: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    type(model).thinks = False
    talk.turn("/think")
    assert "no thinking mode" in capsys.readouterr().err
    assert talk.session.think is None


def test_settings(talk: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("temp=0.5", "top-k 4", "max_tokens=9", "stop=END", "logit_bias=7+2", "seed=1"):
        talk.turn(f"/set {text}")
    talk.turn("a")
    assert {k: v for k, v in model.calls[-1].items() if k not in ("messages", "think", "date")} == {
        "temperature": 0.5, "top_k": 4, "max_tokens": 9, "stop": ["END"], "logit_bias": {7: 2.0},
        "seed": 1,
    }  # fmt: skip
    capsys.readouterr()
    talk.turn("/set")
    shown = capsys.readouterr().err
    assert "temperature = 0.5\n" in shown
    assert "top_p = 1.0  (model's own)" in shown
    talk.turn("/set temp=")
    assert "temperature" not in talk.session.sampling
    for bad in ("temp=hot", "temp=500", "warmth=1", "top_p=7"):
        talk.turn(f"/set {bad}")
        assert "error:" in capsys.readouterr().err
    assert "top_p" not in talk.session.sampling


def test_a_refused_message_leaves_no_trace(
    talk: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.turn("a")
    type(model).error = ContextLengthError(2000, 1000)
    talk.turn("b")
    assert "the context holds 1000" in capsys.readouterr().err
    assert [turn["content"] for turn in talk.session.turns] == ["a", "one"]


def test_files(talk: Chat, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.txt").write_text("noted\n")
    talk.turn("/read notes.txt")
    talk.turn("what?")
    assert contents(model) == ["noted\n\nwhat?"]
    talk.turn("/system S")
    talk.turn("/set temp=0.3")
    talk.turn("/set logit_bias=7-1")
    talk.turn("/save talk.json")
    talk.turn("/clear")
    talk.turn("/set temp=")
    talk.turn("/load talk.json")
    assert [turn["content"] for turn in talk.session.turns] == ["noted\n\nwhat?", "one"]
    assert talk.session.system == "S"
    assert talk.session.sampling == {"temperature": 0.3, "logit_bias": {7: -1.0}}
    capsys.readouterr()
    for command in ("/read missing", "/load missing", "/save no/such/folder", "/read"):
        talk.turn(command)
        assert capsys.readouterr().err.startswith(("error:", "usage:"))


@pytest.mark.parametrize(
    "values",
    [
        [],
        {},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
        {"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "y"}]},
        {"messages": [], "system": 3},
        {"messages": [{"role": "user"}, {"role": "assistant"}], "sampling": []},
        {"messages": [], "sampling": {"logit_bias": [1]}},
        {"messages": [], "sampling": {"logit_bias": {"x": 1}}},
        {"messages": [], "sampling": {"temperature": "hot"}},
        {"messages": [], "sampling": {"best_of": 2}},
        "[" * 100_000,
    ],
    ids=lambda values: str(values)[:60],
)
def test_what_is_not_a_saved_conversation(model: FakeModel, values: object) -> None:
    Path("bad.json").write_text(values if isinstance(values, str) else json.dumps(values))
    session = Session(model)  # type: ignore[arg-type]
    session.turns = [{"role": "user", "content": "kept"}]
    with pytest.raises(RequestError, match="not a saved conversation"):
        session.load(Path("bad.json"))
    assert session.turns[0]["content"] == "kept"


def test_commands(talk: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    talk.turn("/help")
    shown = capsys.readouterr().err
    assert all(name in shown for name in COMMANDS)
    talk.turn("a")
    capsys.readouterr()
    talk.turn("/stats")
    assert "of 1000 tokens of context; seed 5" in capsys.readouterr().err
    talk.turn("/show")
    assert "fake: 135 million parameters" in capsys.readouterr().err
    talk.turn("/render")
    assert capsys.readouterr().out == "<user>a\n"
    talk.turn("/wrong")
    assert "no command /wrong" in capsys.readouterr().err
    talk.turn("/s")
    assert "did you mean" in capsys.readouterr().err
    talk.turn("/regenerate")
    assert "no command /regenerate" in capsys.readouterr().err
    with pytest.raises(Leave):
        talk.turn("/ex")


def test_messages_of_many_lines() -> None:
    assert is_open('"""a')
    assert not is_open('"""a"""')
    assert not is_open('a """')
    assert unquoted('"""\na\n b\n"""') == "a\n b"
    assert unquoted('"""/help"""') == "/help"
    assert unquoted("  a ") == "a"


def test_without_a_terminal_lines_of_stdin_are_messages(
    model_file: str,
    model: FakeModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", stdin_of(b'a\n\n"""b\nc"""\n"""/help"""\n/bye\nnever\n'))
    assert main(["chat", model_file, "first"]) == 0
    asked = [call["messages"][-1]["content"] for call in model.calls]
    assert asked == ["first", "a", "b\nc", "/help"]
    assert capsys.readouterr().out == "one\ntwo\nthree\nmore\n"


def test_the_second_interrupt_leaves(
    talk: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "interactive", True)
    assert talk.loop(None, iter([None, "a", None, None, "never"])) == 130
    assert len(talk.session.turns) == 2
    assert capsys.readouterr().err.count("Ctrl-C again") == 2


def test_an_interrupt_ends_a_chat_that_nobody_types(talk: Chat, model: FakeModel) -> None:
    type(model).on_start = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert talk.loop(None, iter(["a", "never"])) == 130
    assert [turn["content"] for turn in talk.session.turns] == ["a", "one"]


def test_a_model_without_a_template_can_not_chat(
    model_file: str, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    type(model).has_template = False
    assert main(["chat", model_file]) == 2
    assert "--raw" in capsys.readouterr().err


def test_completion_knows_commands_and_files(tmp_path: Path) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from smolrun.cli.prompt import _completer

    completer = _completer(sorted(chat.COMMANDS))

    def texts(typed: str) -> list[str]:
        return [c.text for c in completer.get_completions(Document(typed), CompleteEvent())]

    assert texts("/s") == ["/save", "/set", "/show", "/stats", "/system"]
    assert texts("hello /s") == []
    (tmp_path / "notes.txt").touch()
    assert texts("/read no") == ["tes.txt"]


class Screen:
    """A pseudo-terminal with a program on it."""

    def __init__(self, arguments: Sequence[str], **variables: str) -> None:
        import pty

        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            command = [sys.executable, "-m", "smolrun.cli.main", *arguments]
            os.execve(sys.executable, command, environment(PROMPT_TOOLKIT_NO_CPR="1", **variables))
        self.output = b""
        self.seen = 0

    def until(self, text: bytes) -> None:
        """Read until a text shows that was not there at the last call."""
        end = time.monotonic() + SECONDS
        while (place := self.output.find(text, self.seen)) < 0:
            assert time.monotonic() < end, f"{text!r} did not come: {self.output[-2000:]!r}"
            assert self.read(), f"{text!r} did not come: {self.output[-2000:]!r}"
        self.seen = place + len(text)

    def read(self) -> bool:
        ready, _, _ = select.select([self.descriptor], [], [], SECONDS)
        assert ready, f"nothing came: {self.output[-2000:]!r}"
        try:
            data = os.read(self.descriptor, 65536)
        except OSError:  # the program has gone
            return False
        self.output += data
        return bool(data)

    def type(self, data: bytes) -> None:
        os.write(self.descriptor, data)

    def end(self) -> int:
        while self.read():
            pass
        os.close(self.descriptor)
        ended, status = 0, 0

        def gone() -> bool:
            nonlocal ended, status
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            return ended == self.pid

        if not eventually(gone):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise AssertionError(f"it does not end: {self.output[-2000:]!r}")
        return os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_control_c_stops_the_answer_then_leaves(tiny: Path, tmp_path: Path) -> None:
    screen = Screen(["chat", str(tiny), *ENDLESS], XDG_STATE_HOME=str(tmp_path / "state"))
    screen.until(b">>>")
    screen.type(b"hello\r")
    screen.until(b"\x1b[?2004l")  # the prompt is done with the terminal
    while len(screen.output) < screen.seen + 200:
        assert screen.read(), screen.output[-2000:]
    screen.type(b"\x03")
    screen.until("· stopped".encode())
    screen.until(b">>>")
    screen.type(b"/st\t\r")
    screen.until(b"tokens of context")
    screen.until(b">>>")
    screen.type(b"\x03")
    screen.until(b"Ctrl-C again")
    screen.until(b">>>")
    screen.type(b"\x03")
    assert screen.end() == 130
    history = (tmp_path / "state" / "smolrun" / "history").read_text()
    assert "+hello" in history
    assert b"Traceback" not in screen.output


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_control_d_leaves_with_0(tiny: Path, tmp_path: Path) -> None:
    screen = Screen(["run", str(tiny)], XDG_STATE_HOME=str(tmp_path / "state"))
    screen.until(b">>>")
    screen.type(b'"""two\rlines\x04')
    screen.type(b"\x03")
    screen.until(b"Ctrl-C again")
    screen.until(b">>>")
    screen.type(b"\x04")
    assert screen.end() == 0
