"""Download models, or bring them up to date; prints where they lie."""

from __future__ import annotations

import argparse

from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console

EPILOG = """\
examples:
  smolrun pull
  smolrun pull smollm3-3b:q4_k_m smollm2-360m
  smolrun pull bartowski/SmolLM2-1.7B-Instruct-GGUF:Q6_K
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun pull`."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="aliases or user/repo[:quant]; default: "
        "smollm2-135m",
    )  # fmt: skip
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    from smolrun.files.names import DEFAULT_MODEL, resolve

    for name in arguments.models or [DEFAULT_MODEL]:
        path = resolve(name, progress=console.downloading, refresh=True)
        console.clear_progress()
        console.print(str(path))
    return 0
