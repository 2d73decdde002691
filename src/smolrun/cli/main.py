"""The entry of the command line: finds the verb, runs it, and turns what went wrong into words.

Only the module of the verb that was typed is imported, so help and errors come at once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence

from smolrun.cli.options import Parser, UsageError, console_of
from smolrun.cli.terminal import Console
from smolrun.errors import ContextLengthError, RequestError, SmolrunError

VERBS = {
    "run": "answer a prompt; without one, chat",
    "chat": "talk to a model",
    "serve": "answer over HTTP, as OpenAI's API does",
    "batch": "answer the requests of a file, in OpenAI's batch format",
    "show": "what is in a model: configuration, weight types, memory it needs",
    "tokenize": "text to token ids and back",
    "render": "the exact text that a model is given for a prompt",
    "doctor": "what this machine offers, and what smolrun makes of it",
    "bench": "how fast models run here, beside what the machine can do",
    "perplexity": "how well a model predicts a text",
    "compare": "how far other files of a model are from one of them",
    "formats": "make the formats of a model, and measure size, speed and quality",
    "convert": "safetensors to GGUF, and GGUF to safetensors",
    "quantize": "make a GGUF file of smaller weights",
    "imatrix": "measure which weights matter, for quantize",
    "pull": "download models",
    "list": "models on this machine",
    "rm": "delete downloaded models",
}
SYNONYMS = {"ls": "list", "remove": "rm"}

_HELP = """\
usage: smolrun VERB [...]

Run SmolLM, SmolLM2 and SmolLM3 on the CPU you have.

{verbs}

examples:
  smolrun run "Why is the sky blue?"
  smolrun run smollm3-3b:q4_k_m --think "Is 2027 prime?"
  git diff | smolrun run "Summarize this change."
  smolrun chat smollm2-1.7b

smolrun VERB --help tells all about a verb. Every flag can be set in the environment:
SMOLRUN_TEMP=0.7 stands for --temp 0.7.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # None where the caller closed them: then nobody reads what is written.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    console = Console()
    try:
        return _run(arguments)
    except SystemExit as exit_:  # of argparse
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        console.clear_progress()
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except UsageError as error:
        return _failed(console, error, 2)
    except ContextLengthError as error:
        return _failed(console, error, 1)
    except RequestError as error:
        return _failed(console, error, 2)
    except (SmolrunError, OSError) as error:
        return _failed(console, error, 1)
    except MemoryError as error:
        return _failed(console, error, 1, "out of memory: take a smaller model or a smaller -c")
    except Exception as error:
        hint = "" if _wants_traceback() else " (-v -v shows the traceback)"
        message = f"{type(error).__name__}: {error}; this is a bug in smolrun{hint}"
        return _failed(console, error, 1, message)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if arguments[1:] and arguments[0] == "help":
            return _run([arguments[1], "--help"])
        verbs = "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items())
        print(_HELP.format(verbs=verbs), end="")
        return 0
    verb = SYNONYMS.get(arguments[0], arguments[0])
    if verb in ("--version", "-V", "version"):
        from smolrun.cli.doctor import version_line

        print(version_line())
        return 0
    if verb not in VERBS:
        raise UsageError(_unknown(verb))
    module = importlib.import_module(f"smolrun.cli.{verb}")
    parser = Parser(
        f"smolrun {verb}", (module.__doc__ or "").strip(), getattr(module, "EPILOG", "")
    )
    module.add_arguments(parser)
    parsed = parser.parse_intermixed_args(arguments[1:])  # flags stand between words too
    if parsed.verbose >= 2:
        os.environ["SMOLRUN_DEBUG"] = "1"
    console = console_of(parsed)
    if (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"):
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    with _listening(console):
        code: int = module.main(parsed, console)
    sys.stdout.flush()
    return code


class _ToConsole(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def filter(self, record: logging.LogRecord) -> bool:
        """What a server logs of each request says nothing without its fields."""
        return record.levelno >= logging.WARNING or record.name == "smolrun"

    def emit(self, record: logging.LogRecord) -> None:
        self._console.note(record.getMessage())


@contextlib.contextmanager
def _listening(console: Console) -> Iterator[None]:
    """Show what the package has to say as notes; libraries speak only when asked to.

    Afterwards the package's logger is as it was: who calls `main` may have use for it.
    """
    logger = logging.getLogger("smolrun")
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers = [_ToConsole(console)]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if console.verbose else logging.WARNING)
    if not console.verbose:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


def _failed(console: Console, error: BaseException, code: int, message: str = "") -> int:
    if _wants_traceback():
        import traceback

        console.clear_progress()
        traceback.print_exception(error)
    console.error(message or _text(error))
    return code


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, SmolrunError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _wants_traceback() -> bool:
    return os.environ.get("SMOLRUN_DEBUG", "0") not in ("", "0")


def _unknown(verb: str) -> str:
    if verb.startswith("-"):
        return f"{verb}: flags come after a verb, as in smolrun run {verb}; see smolrun --help"
    close = difflib.get_close_matches(verb, [*VERBS, *SYNONYMS], n=2)
    if close:
        meant = " or ".join(f"smolrun {name}" for name in close)
        return f"there is no verb {verb!r}; did you mean {meant}?"
    return f"there is no verb {verb!r}; to ask a model: smolrun run {verb!r}; see smolrun --help"


def _drop_stdout() -> None:
    """The reader of our output has gone; the last flush of the interpreter must not complain."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


if __name__ == "__main__":
    sys.exit(main())
