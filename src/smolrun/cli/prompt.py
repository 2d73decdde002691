"""The line that a user types at: history, completion, messages of many lines (prompt_toolkit)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.cli.terminal import Console

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

_TAKES_A_FILE = ("/read ", "/load ", "/save ")


def state_folder() -> Path:
    """Folder of what smolrun remembers from one time to the next, such as the history."""
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base).expanduser() / "smolrun"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "smolrun"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "smolrun" / "State"
    return Path.home() / ".local" / "state" / "smolrun"


def read_messages(commands: Sequence[str], console: Console) -> Iterator[str | None]:
    """What is typed, until Ctrl-D; None for a Ctrl-C."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(
        history=_history(console),
        completer=_completer(commands),
        complete_while_typing=False,
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation=lambda width, *_: "." * (width - 1) + " ",
    )
    while True:
        try:
            yield session.prompt(">>> ")
        except KeyboardInterrupt:
            yield None
        except EOFError:
            return


def _history(console: Console) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = state_folder() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # it holds what was asked
        return FileHistory(str(path))
    except OSError as error:
        console.note(f"no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    from smolrun.cli.chat import is_open

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(commands: Sequence[str]) -> Completer:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
            text = document.text_before_cursor
            if text.startswith(_TAKES_A_FILE):
                typed = text.partition(" ")[2].lstrip()
                yield from paths.get_completions(Document(typed), complete_event)
            elif text.startswith("/") and " " not in text:
                for name in commands:
                    if name.startswith(text.lower()):
                        yield Completion(name, start_position=-len(text))

    return Commands()
