"""Measure which columns of a model's weights matter, for `smolrun quantize --imatrix`.

The model reads a text; for each weight the squares of what its columns are multiplied with are
summed. The file has llama.cpp's format, in GGUF, which its programs read too. Without --text a text
that comes with smolrun is read; tens of thousands of words of what the model is for are better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console

EPILOG = """\
examples:
  smolrun imatrix smollm3.bf16.gguf smollm3.imatrix.gguf --text notes.txt
  smolrun quantize smollm3.bf16.gguf q4_k_m --imatrix smollm3.imatrix.gguf
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun imatrix`."""
    parser.add_argument("model", metavar="MODEL", help="a path, an alias or user/repo[:quant]")
    parser.add_argument("target", metavar="OUT", help="the file to write; .gguf by custom")
    options.add_text(parser)
    options.add_reading(parser)
    parser.flag("--force", action="store_true", help="replace what is at OUT")
    parser.flag("--offline", action="store_true", help="ask no network; use what is there")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    from smolrun.api import Model
    from smolrun.errors import OutputError
    from smolrun.files.imatrix import write_imatrix
    from smolrun.files.output import check_output
    from smolrun.measure.importance import measure_importance

    target = Path(arguments.target).expanduser()
    if target.exists() and not arguments.force:
        raise OutputError(f"{target}: is there already; --force replaces it")
    check_output(target)
    text = options.text_of(arguments)
    path = options.resolved(arguments.model, arguments, console)
    with Model(path, **options.reading_of(arguments)) as model:
        found = measure_importance(
            model,
            text,
            arguments.text.name if arguments.text else "smolrun's sample of English",
            context=arguments.window,
            progress=lambda done, total: console.working("pieces", done, total),
        )
    console.clear_progress()
    write_imatrix(target, found)
    tokens = found.chunk_count * found.chunk_size
    console.note(f"{len(found.sums)} weights, {tokens} tokens")
    console.print(str(target))
    return 0
