"""The exact text, or token ids, that a model is given for a prompt or a conversation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console, is_terminal
from smolrun.errors import ModelFormatError, TemplateError

EPILOG = """\
examples:
  smolrun render "Hello"
  smolrun render smollm3-3b --no-think --date 2025-07-01 -s "Be brief." "Hello"
  smolrun render --messages conversation.json --ids
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun render`."""
    options.add_prompt(parser)
    options.add_model(parser)
    parser.flag("--messages", type=Path, metavar="PATH",
                help="a JSON array of messages, as the API takes them; - is stdin")  # fmt: skip
    parser.flag("--tools", type=Path, metavar="PATH", help="a JSON array of tools")
    parser.flag("--ids", action="store_true", help="print token ids")
    parser.flag("--no-generation-prompt", action="store_true", help="leave the answer's turn out")
    options.add_conversation(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    name, words = options.model_and_words(arguments)
    messages = _messages(arguments, words)
    tools = None if arguments.tools is None else _json_list(arguments.tools)
    path = options.resolved(name, arguments, console)
    from smolrun.files.checkpoint import open_checkpoint
    from smolrun.text.chat import ChatTemplate
    from smolrun.text.tokenizer import Tokenizer

    checkpoint = open_checkpoint(path)
    try:
        if checkpoint.tokenizer is None:
            raise ModelFormatError(f"{path}: there is no tokenizer beside these weights")
        if checkpoint.chat_template is None:
            raise TemplateError(f"{path}: this model has no chat template")
        tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
        template = ChatTemplate(checkpoint.chat_template, tokenizer, str(path))
    finally:
        checkpoint.close()
    chosen: dict[str, Any] = {
        "tools": tools,
        "enable_thinking": arguments.think,
        "date": arguments.date,
        "add_generation_prompt": not arguments.no_generation_prompt,
    }
    if arguments.ids:
        console.print(" ".join(map(str, template.encode(messages, **chosen))))
        return 0
    text = template.render(messages, **chosen)
    console.write(text)
    if is_terminal(console.out) and not text.endswith("\n"):
        console.write("\n")  # a pipe gets the exact text
    return 0


def _messages(arguments: argparse.Namespace, words: list[str]) -> list[Any]:
    prompt = options.prompt_of(arguments, words, stdin=arguments.messages is None)
    if arguments.messages is None and prompt is None:
        raise UsageError("there is no prompt: give one, or a conversation with --messages")
    messages = [] if arguments.messages is None else _json_list(arguments.messages)
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    if prompt is not None:
        messages.append({"role": "user", "content": prompt})
    return messages


def _json_list(path: Path) -> list[Any]:
    text = options.read_stdin() if str(path) == "-" else options.read_text(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if isinstance(values, dict) and isinstance(values.get("messages"), list):
        values = values["messages"]
    if not isinstance(values, list):
        raise UsageError(f"{path}: expected a JSON array, found {type(values).__name__}")
    return values
