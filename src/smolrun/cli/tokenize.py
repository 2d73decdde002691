"""Text to token ids, as the model sees it, and back.

The text may come from words, -p, -f and stdin.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console, table
from smolrun.errors import ModelFormatError

if TYPE_CHECKING:
    from pathlib import Path

    from smolrun.text.tokenizer import Tokenizer

EPILOG = """\
examples:
  smolrun tokenize "Hello, world!"
  smolrun tokenize smollm3-3b --pieces "Hello"
  smolrun tokenize --decode 28120 28 905
  smolrun tokenize --count < book.txt
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun tokenize`."""
    options.add_prompt(parser)
    options.add_model(parser)
    parser.flag("--decode", action="store_true", help="the words are token ids; print their text")
    parser.flag("--pieces", action="store_true", help="a line for every token, with its text")
    parser.flag("--count", action="store_true", help="print the number of tokens")
    parser.flag("--no-special", action="store_true", help="text such as <|im_end|> is plain text")
    parser.flag("--json", action="store_true", help="print a JSON array of ids and texts")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    name, words = options.model_and_words(arguments)
    text = options.prompt_of(arguments, words, strip=False)
    if text is None:
        raise UsageError("there is no text: give it after the model, with -p, -f or on stdin")
    tokenizer = load_tokenizer(options.resolved(name, arguments, console))
    if arguments.decode:
        console.print(tokenizer.decode(_ids(text, tokenizer)))
        return 0
    ids = tokenizer.encode(text, parse_special=not arguments.no_special)
    if arguments.count:
        console.print(str(len(ids)))
    elif arguments.json:
        tokens = [{"id": i, "text": _text(tokenizer, i)} for i in ids]
        console.print(json.dumps(tokens, ensure_ascii=False))
    elif arguments.pieces:
        rows = [(str(i), repr(_text(tokenizer, i))) for i in ids]
        console.print(table(rows, right=(0,)) if rows else "")
    else:
        console.print(" ".join(map(str, ids)))
    return 0


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model's files. ModelFormatError where they have none."""
    from smolrun.files.checkpoint import open_checkpoint
    from smolrun.text.tokenizer import Tokenizer

    checkpoint = open_checkpoint(path)
    try:
        if checkpoint.tokenizer is None:
            raise ModelFormatError(f"{path}: there is no tokenizer beside these weights")
        return Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
    finally:
        checkpoint.close()


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; bytes that are no whole character show as U+FFFD."""
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    ids = []
    for word in text.replace(",", " ").split():
        if not word.isdecimal():
            raise UsageError(f"--decode takes token ids, found {word!r}")
        ids.append(int(word))
    return ids
