"""How far other files of a model are from one of them, the base: quality, measured.

All models read the same text side by side. Mean KL divergence says how far the distribution of the
next token moved (0: not at all), top-1 how often the likeliest token is the same, and the ratio of
perplexities what it costs. Each comes with its standard error.

Where a model rounds its activations, its loss is split: that of the format, computed exactly, and
that of the arithmetic, against its own exact reading.
"""

from __future__ import annotations

import argparse

from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console

EPILOG = """\
examples:
  smolrun compare model-f16.gguf model-q8_0.gguf model-q4_k_m.gguf
  smolrun compare folder/ model.gguf --text notes.txt --json
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun compare`."""
    parser.add_argument("base", metavar="BASE", help="what the others are compared with")
    parser.add_argument(
        "others", nargs="+", metavar="OTHER", help="the same model in other formats"
    )
    parser.flag("--offline", action="store_true", help="ask no network; use what is there")
    options.add_text(parser)
    options.add_reading(parser)
    options.add_form(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    from smolrun.measure.comparison import compare

    text = options.text_of(arguments)
    paths = [
        options.resolved(name, arguments, console) for name in (arguments.base, *arguments.others)
    ]
    found = compare(
        paths[0],
        paths[1:],
        text,
        window=arguments.window,
        progress=lambda done, total: console.working("windows", done, total),
        **options.reading_of(arguments),
    )
    console.clear_progress()
    options.print_found(found.as_dict(), found.parts(), arguments, console)
    return 0
