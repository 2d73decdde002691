"""Delete downloaded models. Files that were not downloaded are never touched."""

from __future__ import annotations

import argparse

from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console, human_bytes


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun rm`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names as smolrun list has them")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    from smolrun.files.names import remove

    for name in arguments.models:
        model, freed = remove(name)
        console.note(f"deleted {model.name}, {human_bytes(freed)} freed")
    return 0
