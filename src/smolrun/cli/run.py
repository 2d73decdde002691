"""Answer a prompt. Without one, on a terminal, chat.

The prompt may come from words, -p, -f and stdin; they are put together in this order.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smolrun.cli import options
from smolrun.cli.answer import AnswerPrinter, as_json, statistics_line, stops_on_interrupt
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console, is_terminal
from smolrun.errors import TemplateError

if TYPE_CHECKING:
    from smolrun.api import Model, Stream

EPILOG = """\
examples:
  smolrun run "Why is the sky blue?"
  smolrun run smollm3-3b --think --max-tokens 2000 "How many primes are below 100?"
  smolrun run ./model.gguf -s "Answer in French." -f letter.txt
  smolrun run -j '{"enum": ["yes", "no"]}' "Is the sky blue?"
  git log -5 | smolrun run -p "What was done?" --json
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun run`."""
    options.add_prompt(parser)
    options.add_model(parser)
    parser.flag("-i", "--interactive", action="store_true", help="chat after the first answer")
    parser.flag("--raw", action="store_true", help="continue the prompt as it is, no chat template")
    parser.flag("--hide-thinking", action="store_true", help="do not show the thinking")
    parser.flag("--json", action="store_true", help="print the whole result as one JSON object")
    options.add_conversation(parser)
    options.add_budget(parser)
    options.add_structure(parser)
    options.add_engine(parser)
    options.add_sampling(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    name, words = options.model_and_words(arguments)
    chats = arguments.interactive or (console.interactive and not _has_prompt(arguments, words))
    prompt = options.prompt_of(arguments, words, stdin=not chats)
    if chats:
        from smolrun.cli import chat

        if arguments.json or arguments.raw:
            raise UsageError("--json and --raw are for one prompt, not for a chat")
        return chat.talk(name, prompt, arguments, console)
    if prompt is None:
        raise UsageError("there is no prompt: give one after the model, with -p, -f or on stdin")
    with load(name, arguments, console) as model:
        stream = _stream(model, prompt, arguments, console)
        if arguments.json:
            with stops_on_interrupt(stream.cancel):
                result = stream.result()
            console.print(json.dumps(as_json(result, name), ensure_ascii=False))
        else:
            result = AnswerPrinter(console, arguments.hide_thinking).show(stream)
            console.note(statistics_line(result))
    return 130 if result.finish_reason == "cancelled" else 0


def _has_prompt(arguments: argparse.Namespace, words: list[str]) -> bool:
    return bool(words) or arguments.prompt is not None or arguments.file is not None


def _stream(model: Model, prompt: str, arguments: argparse.Namespace, console: Console) -> Stream:
    asked = options.sampling_of(arguments) | options.structure_of(arguments)
    raw = arguments.raw
    if not raw and not has_template(model):
        console.note(f"{model.name} has no chat template: it continues the prompt as it is")
        raw = True
    if raw:
        if arguments.system or arguments.think or arguments.thinking_budget:
            raise UsageError("--system, --think and --thinking-budget need a chat template")
        if is_terminal(sys.stdout):
            console.write(prompt)
        return model.stream_text(prompt, **asked)
    messages = [{"role": "user", "content": prompt}]
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    if arguments.thinking_budget is not None:
        asked["thinking_budget"] = arguments.thinking_budget
    return model.stream(messages, think=arguments.think, date=arguments.date, **asked)


def has_template(model: Model) -> bool:
    """Whether a model can chat."""
    try:
        return model.template is not None
    except TemplateError:
        return False


def load(name: str, arguments: argparse.Namespace, console: Console) -> Model:
    """Load a model with lines of progress, and say what was decided on the way."""
    path: Path = options.resolved(name, arguments, console)
    from smolrun.api import Model

    model = Model(
        path,
        dtype=arguments.dtype,
        context_size=arguments.context_size,
        threads=arguments.threads,
        activations=arguments.activations,
        load_progress=lambda done, total: console.working(f"loading {path.name}", done, total),
    )
    console.clear_progress()
    if console.verbose:
        loaded = model.loaded
        console.note(f"{path}: {loaded.threads.value} threads, {loaded.threads.why}")
        console.note(f"context of {model.context_size} tokens: {loaded.kv_plan.why}")
    for note in model.notes:
        console.note(note)
    return model
