"""Answer the requests of a file, many at a time, in OpenAI's batch format.

A line of the input has custom_id, method (POST), url (/v1/chat/completions, /v1/completions or
/v1/embeddings) and body; of the output custom_id, response and error. Run it again to go on with a
job that was cut off.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console

EPILOG = """\
examples:
  smolrun batch requests.jsonl answers.jsonl
  smolrun batch requests.jsonl answers.jsonl -m smollm3-3b:q4_k_m --parallel 32

A line of the input, here on two:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
   "body": {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 100}}
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun batch`."""
    parser.add_argument("input", type=Path, metavar="IN.jsonl")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    options.add_model(parser)
    options.add_requests(parser, 32, "requests that run side by side")
    options.add_engine(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    try:
        from smolrun.integrations.batch import run_batch
    except ModuleNotFoundError as error:
        raise UsageError(f"batch needs {error.name}: pip install 'smolrun[server]'") from None
    from smolrun.api import Model

    if not arguments.input.is_file():
        raise UsageError(f"{arguments.input}: there is no such file")
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise UsageError("the output is the input")
    name, _ = options.model_and_words(arguments)
    path = options.resolved(name, arguments, console)
    with Model(
        path,
        **options.reading_of(arguments),
        context_size=arguments.context_size,
        max_sequences=arguments.parallel,
    ) as model:
        done = run_batch(
            model,
            arguments.input,
            arguments.output,
            names=tuple(arguments.alias or ()) or (name, model.name),
            parallel=arguments.parallel,
            progress=lambda done, total: console.working("requests", done, total),
        )
    console.clear_progress()
    answered = done.total - done.before
    console.note(
        f"{answered} of {done.total} requests answered"
        + (f", {done.before} were already" if done.before else "")
        + (f"; {done.failed} failed, see their status_code" if done.failed else "")
    )
    return 0
