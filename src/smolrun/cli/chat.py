"""Talk to a model.

Alt-Enter, or lines between triple quotes, make a message of many lines. Ctrl-C stops an answer;
pressed again it leaves. /help lists the commands. Without a terminal every line of stdin is a
message.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smolrun.cli import options
from smolrun.cli.answer import AnswerPrinter, statistics_line
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.session import Session
from smolrun.cli.terminal import Console
from smolrun.errors import SmolrunError

if TYPE_CHECKING:
    from smolrun.api import Stream

QUOTES = '"""'


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun chat`."""
    options.add_prompt(parser)
    options.add_model(parser)
    parser.flag("--hide-thinking", action="store_true", help="do not show the thinking")
    options.add_conversation(parser)
    options.add_budget(parser)
    options.add_structure(parser)
    options.add_engine(parser)
    options.add_sampling(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    name, words = options.model_and_words(arguments)
    prompt = options.prompt_of(arguments, words, stdin=False)
    return talk(name, prompt, arguments, console)


def talk(name: str, first: str | None, arguments: argparse.Namespace, console: Console) -> int:
    """Chat until the user leaves; `first` is the first message."""
    from smolrun.cli.run import has_template, load

    with load(name, arguments, console) as model:
        if not has_template(model):
            raise UsageError(
                f"{model.name} has no chat template, so it can not chat; "
                "smolrun run --raw continues text"
            )
        sampling = options.sampling_of(arguments)
        session = Session(model, arguments.system, arguments.think, arguments.date, sampling)
        session.structure = options.structure_of(arguments)
        if arguments.think:
            session.switch_thinking(True)
        if arguments.thinking_budget is not None:
            session.limit_thinking(arguments.thinking_budget)
        chat = Chat(session, console, arguments.hide_thinking)
        if console.interactive:
            from smolrun.cli.prompt import read_messages

            console.note(f"{name}: context of {model.context_size} tokens, /help for help")
            return chat.loop(first, read_messages(sorted(COMMANDS), console))
        return chat.loop(first, _read_lines())


def _read_lines() -> Iterator[str]:
    """Messages from stdin, where nobody types: a line each, or lines between triple quotes."""
    gathered: list[str] = []
    for line in sys.stdin or ():
        gathered.append(line.rstrip("\n"))
        text = "\n".join(gathered)
        if not is_open(text):
            gathered = []
            yield text
    if gathered:
        yield "\n".join(gathered)


def is_open(text: str) -> bool:
    """Whether a message began with triple quotes that have not been closed."""
    start = text.lstrip()
    return start.startswith(QUOTES) and QUOTES not in start[len(QUOTES) :]


def unquoted(text: str) -> str:
    """A message without the triple quotes around it, or without the blanks."""
    text = text.strip()
    if not text.startswith(QUOTES):
        return text
    inside, _, after = text[len(QUOTES) :].partition(QUOTES)
    return (inside + after).strip("\n")


class Leave(Exception):
    """The user wants to go."""


class Chat:
    """Takes messages and commands, and prints what comes of them."""

    def __init__(self, session: Session, console: Console, hide_thinking: bool = False) -> None:
        self.session = session
        self.console = console
        self.printer = AnswerPrinter(console, hide_thinking)

    def loop(self, first: str | None, messages: Iterator[str | None]) -> int:
        """Answer until the messages end; None in their place is a Ctrl-C at the prompt.

        The first Ctrl-C stops an answer, or says what the second one does: leave. Where nobody
        types, the first one leaves.
        """
        interrupted = self.turn(first) if first else False
        for message in messages:
            if interrupted and not self.console.interactive:
                return 130
            if message is None:
                if interrupted:
                    return 130
                interrupted = True
                self.console.note("Ctrl-C again, Ctrl-D or /exit to leave.")
                continue
            try:
                interrupted = self.turn(message)
            except Leave:
                return 0
        return 130 if interrupted and not self.console.interactive else 0

    def turn(self, message: str) -> bool:
        """One message or command; whether its answer was interrupted."""
        text = unquoted(message)
        if not text and not self.session.attached:
            return False
        try:
            if text.startswith("/") and not message.strip().startswith(QUOTES):
                return self._command(text)
            return self._answer(self.session.ask(text))
        except (SmolrunError, UsageError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self.console.error(str(error))
            return False

    def _answer(self, stream: Stream) -> bool:
        try:
            result = self.printer.show(stream)
        except BaseException:
            self.session.failed()
            raise
        self.session.answered(result)
        self.console.note(statistics_line(result))
        return result.finish_reason == "cancelled"

    def _command(self, text: str) -> bool:
        name, _, argument = text.partition(" ")
        command = COMMANDS.get(name.lower())
        if command is None:
            near = [known for known in COMMANDS if known.startswith(name.lower())]
            if len(near) != 1:
                hint = f"; did you mean {' or '.join(near)}?" if near else "; /help lists them"
                self.console.error(f"there is no command {name}{hint}")
                return False
            command = COMMANDS[near[0]]
        argument = argument.strip()
        if command.usage and not command.usage.startswith("[") and not argument:
            self.console.error(f"usage: {name} {command.usage}")
            return False
        return bool(command.run(self, argument))

    def _say(self, text: str) -> None:
        """What a command has to tell, on stderr even when quiet: it was asked for."""
        self.console.err.write(self.console.dim(text) + "\n")
        self.console.err.flush()

    def help(self, _: str) -> None:
        """List the commands."""
        shown: dict[str, list[str]] = {}
        for name, command in COMMANDS.items():
            shown.setdefault(f"{command.usage}\n{command.help}", []).append(name)
        lines = []
        for entry, names in shown.items():
            usage, _, text = entry.partition("\n")
            lines.append(f"  {' '.join([', '.join(names), usage]).strip():28} {text}")
        keys = '  """                          begins and ends a message of many lines\n'
        keys += "  Alt-Enter                    a new line\n"
        keys += "  Ctrl-C                       stops the answer; pressed again it leaves"
        self._say("\n".join(lines) + "\n" + keys)

    def leave(self, _: str) -> None:
        """Leave the chat."""
        raise Leave

    def clear(self, _: str) -> None:
        """Forget the conversation."""
        self.session.clear()
        self._say("The conversation is forgotten; system prompt and settings stay.")

    def regenerate(self, _: str) -> bool:
        """Answer the last message again."""
        return self._answer(self.session.again())

    def undo(self, _: str) -> None:
        """Take back the last message."""
        done = self.session.undo()
        left = sum(turn["role"] == "user" for turn in self.session.turns)
        self._say(f"Taken back; {left} messages are left." if done else "There is nothing to undo.")

    def system(self, text: str) -> None:
        """Show or change the system prompt."""
        if text:
            self.session.system = None if text == "-" else unquoted(text)
        self._say(f"system prompt: {self.session.system or 'the template’s own'}")

    def set(self, text: str) -> None:
        """Show or change sampling."""
        self._say(self.session.set(text) if text else "\n".join(self.session.settings()))

    def think(self, _: str) -> None:
        """Think before answering."""
        self.session.switch_thinking(True)
        self._say("Thinking is on.")

    def no_think(self, _: str) -> None:
        """Answer at once."""
        self.session.switch_thinking(False)
        self._say("Thinking is off.")

    def budget(self, text: str) -> None:
        """Show or set how long thinking may take."""
        if text:
            try:
                tokens = int(text)
            except ValueError:
                raise UsageError(f"/budget: expected a number of tokens, found {text!r}") from None
            self.session.limit_thinking(tokens)
        self._say(f"thinking: {_thinking(self.session)}")

    def read(self, text: str) -> None:
        """Put a file in front of the next message."""
        size = self.session.attach(Path(text))
        self._say(f"{text}: {size} characters go with your next message.")

    def save(self, text: str) -> None:
        """Write the conversation to a file."""
        self.session.save(Path(text))
        self._say(f"Saved to {text}.")

    def load(self, text: str) -> None:
        """Take a saved conversation."""
        self.session.load(Path(text))
        self._say(f"{len(self.session.turns) // 2} messages with their answers.")

    def statistics(self, _: str) -> None:
        """What the last answer cost."""
        last = self.session.last
        if last is None:
            self._say("There is no answer yet.")
            return
        used = last.usage.total_tokens
        size = self.session.model.context_size
        self._say(f"{statistics_line(last)}\n{used} of {size} tokens of context; seed {last.seed}")

    def show(self, _: str) -> None:
        """The model and its settings."""
        model, config = self.session.model, self.session.model.config
        lines = [
            f"{model.name}: {config.num_parameters / 1e6:.0f} million parameters, "
            f"{config.num_hidden_layers} layers, context of {model.context_size} tokens",
            f"system prompt: {self.session.system or 'the template’s own'}",
            f"thinking: {_thinking(self.session)}",
            *self.session.settings(),
        ]
        self._say("\n".join(lines))

    def render(self, _: str) -> None:
        """The text that the model is given."""
        self.console.print(self.session.rendered() or "The conversation is empty.")


def _thinking(session: Session) -> str:
    if not session.model.template.supports_thinking:
        return "this model has none"
    switch = {None: "as the template has it", True: "on", False: "off"}[session.think]
    if session.budget is None:
        return switch
    return "on, loops are broken" if session.budget < 0 else f"on, at most {session.budget} tokens"


class Command(NamedTuple):
    """A command of the chat."""

    run: Callable[[Chat, str], object]
    usage: str  # of its argument; in brackets where that may be left out
    help: str


COMMANDS = {
    "/help": Command(Chat.help, "", "this list"),
    "/exit": Command(Chat.leave, "", "leave (also Ctrl-D)"),
    "/bye": Command(Chat.leave, "", "leave (also Ctrl-D)"),
    "/clear": Command(Chat.clear, "", "forget the conversation"),
    "/regen": Command(Chat.regenerate, "", "answer the last message again"),
    "/undo": Command(Chat.undo, "", "take back the last message and its answer"),
    "/system": Command(Chat.system, "[TEXT]", "show or set the system prompt; - for none"),
    "/set": Command(Chat.set, "[KEY=VALUE]", "show or set sampling, such as temperature=0.7"),
    "/think": Command(Chat.think, "", "think before answering"),
    "/nothink": Command(Chat.no_think, "", "answer at once"),
    "/budget": Command(Chat.budget, "[N]", "think at most N tokens; 0: none, -1: no limit"),
    "/read": Command(Chat.read, "FILE", "put a text file in front of the next message"),
    "/save": Command(Chat.save, "FILE", "write the conversation to a JSON file"),
    "/load": Command(Chat.load, "FILE", "take a saved conversation"),
    "/stats": Command(Chat.statistics, "", "what the last answer cost"),
    "/show": Command(Chat.show, "", "the model and its settings"),
    "/render": Command(Chat.render, "", "the exact text that the model is given"),
}
