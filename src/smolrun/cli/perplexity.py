"""How well a model predicts a text: its perplexity, lower is better.

The text is cut into windows as llama.cpp's `perplexity` cuts it, so figures on the same text
compare. Without --text a text that comes with smolrun is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console

EPILOG = """\
examples:
  smolrun perplexity
  smolrun perplexity model.gguf --text wiki.test.raw
  smolrun perplexity smollm3-3b:q4_k_m --text notes.txt --window 2048 --stride 512
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun perplexity`."""
    parser.add_argument("words", nargs="*", metavar="[MODEL]", help="a path, an alias, user/repo")
    options.add_model(parser)
    options.add_text(parser)
    parser.flag("--stride", type=options.positive, metavar="N",
                help="windows begin N tokens apart, and the last N of each count; default: "
                "windows follow each other, and the second half of each counts")  # fmt: skip
    options.add_reading(parser)
    parser.flag("--json", action="store_true", help="print one JSON object")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    from smolrun.api import Model

    names = ([arguments.model] if arguments.model else []) + arguments.words
    names = names or [options.model_and_words(arguments)[0]]
    if len(names) > 1:
        raise UsageError(f"perplexity takes one model, found also {' '.join(names[1:])}")
    text = options.text_of(arguments)
    path = options.resolved(names[0], arguments, console)
    with Model(path, **options.reading_of(arguments)) as model:
        found = model.perplexity(
            text,
            context=arguments.window,
            stride=arguments.stride,
            progress=lambda done, total: console.working("windows", done, total),
        )
    console.clear_progress()
    if arguments.json:
        console.print(json.dumps({"model": model.name} | dataclasses.asdict(found)))
    else:
        console.print(f"perplexity {found}")
    return 0
