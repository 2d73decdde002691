"""Serve a model over HTTP, under the routes of OpenAI, llama.cpp and vLLM.

It listens on this machine only, unless --host says otherwise; then it wants a key.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console
from smolrun.errors import ResourceError

if TYPE_CHECKING:
    from smolrun.api import Model
    from smolrun.server.run import Progress
    from smolrun.server.service import Settings

EPILOG = """\
examples:
  smolrun serve smollm3-3b
  smolrun serve model.gguf --alias my-model --port 9000 --parallel 8
  smolrun serve --host 0.0.0.0 --api-key-file keys.txt

  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

http://127.0.0.1:8080/docs has the routes. SIGTERM, or Ctrl-C, lets answers under way come to their
end; a second one does not.

The KV cache has room for a whole context of each of --parallel answers, or for as many as fit in
memory; memory is taken as contexts fill. An answer begins when what it may need is to be had: a
max_tokens in the request, or a smaller -c, lets more of them run at a time.
"""

# A step of sixteen tokens takes about three times as long as one of one; more of them gain little
# and slow down every answer (docs/decisions.md).
DEFAULT_PARALLEL = 16


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun serve`."""
    parser.add_argument("words", nargs="*", metavar="[MODEL]", help="a path, an alias, user/repo")
    options.add_model(parser)
    parser.flag("--host", default="127.0.0.1", metavar="ADDRESS",
                help="where to listen (default 127.0.0.1)")  # fmt: skip
    parser.flag("--port", type=int, default=8080, help="default 8080; 0: any that is free")
    parser.flag("--api-key", action="append", metavar="KEY",
                help="a key that requests must have; may be repeated")  # fmt: skip
    parser.flag("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    parser.flag("--insecure", action="store_true", help="let other machines in without a key")
    parser.flag("--cors-origins", action="append", metavar="ORIGIN",
                help="pages of this origin may ask, as https://a.org; repeatable")  # fmt: skip
    options.add_requests(
        parser,
        DEFAULT_PARALLEL,
        "answers that run side by side, as far as memory allows; the others wait",
    )
    parser.flag("--queue", type=options.positive, metavar="N",
                help="requests that may wait beside them (default 64)")  # fmt: skip
    parser.flag("--timeout", type=float, metavar="SECONDS",
                help="most time of one answer (default 600)")  # fmt: skip
    parser.flag("--drain-timeout", type=float, metavar="SECONDS",
                help="time for answers under way at the end (default 30)")  # fmt: skip
    parser.flag("--log-format", choices=("json", "text"), default="json",
                help="of the lines on stderr (default json)")  # fmt: skip
    options.add_engine(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    try:
        from smolrun.server import logs
        from smolrun.server.run import check_bind, serve
    except ModuleNotFoundError as error:
        raise UsageError(f"the server needs {error.name}: pip install 'smolrun[server]'") from None
    name, rest = options.model_and_words(arguments)
    if rest:
        raise UsageError(f"{rest[0]!r} is not a model")
    settings = settings_of(arguments, name)
    if (refused := check_bind(settings, arguments.insecure)) is not None:
        raise UsageError(refused)
    path = options.resolved(name, arguments, console)
    logs.listen(arguments.log_format)
    if arguments.context_size is not None and arguments.context_size < 2:
        raise UsageError("--ctx-size: expected at least 2")

    def load(progress: Progress) -> Model:
        from smolrun.api import Model

        return Model(
            path,
            **options.reading_of(arguments),
            context_size=arguments.context_size,
            max_sequences=settings.parallel,
            load_progress=progress,
        )

    try:
        return serve(settings, load)
    except ResourceError as error:
        console.error(str(error))
        return 2


def _spoken(name: str) -> str:
    """What clients call a model that was named so: an alias stays, a path loses its folders."""
    path = Path(name)
    return path.name.removesuffix(".gguf") if path.exists() else name


def settings_of(arguments: argparse.Namespace, name: str) -> Settings:
    """What the flags ask for, and the model `name`."""
    from smolrun.server.limits import Limits
    from smolrun.server.service import Settings

    keys = list(arguments.api_key or [])
    if arguments.api_key_file is not None:
        keys += options.read_text(arguments.api_key_file).split()
        if not keys:
            raise UsageError(f"{arguments.api_key_file}: there is no key in it")
    if any(not key or not key.isascii() or not key.isprintable() for key in keys):
        raise UsageError("--api-key: expected printable ASCII characters")
    changes = {
        "queued_requests": arguments.queue,
        "total_seconds": arguments.timeout,
        "drain_seconds": arguments.drain_timeout,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    for name, value in given.items():
        if not 0 < value < 1e9:
            raise UsageError(f"{name}: expected a number above 0, got {value}")
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port: expected 0 to 65535, got {arguments.port}")
    return Settings(
        host=arguments.host,
        port=arguments.port,
        api_keys=tuple(keys),
        names=tuple(arguments.alias or ()) or (_spoken(name),),
        cors_origins=tuple(arguments.cors_origins or ()),
        parallel=arguments.parallel,
        limits=dataclasses.replace(Limits(), **given),
    )
