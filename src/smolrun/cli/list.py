"""Models on this machine, under the names that run them."""

from __future__ import annotations

import argparse
import datetime
import json

from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console, human_bytes, table


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun list`."""
    parser.flag("--json", action="store_true", help="print a JSON array")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    from smolrun.files.names import cached_models

    models = cached_models()
    if arguments.json:
        values = [
            {
                "name": model.name,
                "path": str(model.path),
                "size_bytes": model.size_bytes,
                "modified": _date(model.modified),
            }
            for model in models
        ]
        console.print(json.dumps(values, ensure_ascii=False, indent=1))
    elif models:
        rows = [("NAME", "SIZE", "FETCHED")]
        rows += [(m.name, human_bytes(m.size_bytes), _date(m.modified)) for m in models]
        console.print(table(rows, right=(1,)))
    else:
        console.note("No model is downloaded. smolrun pull fetches the default one.")
    return 0


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).date().isoformat()
