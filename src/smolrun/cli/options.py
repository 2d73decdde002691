"""The flags that verbs share, each with its environment variable, and what they stand for."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smolrun.cli.terminal import Console, is_terminal
from smolrun.errors import ModelNotFoundError

if TYPE_CHECKING:
    from smolrun.measure.tables import Table

PREFIX = "SMOLRUN_"
MAX_TEXT_BYTES = 32 << 20  # of a prompt; a context of 131072 tokens is about 0.6 MB of English
_ON, _OFF = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}

# destination: argument of the API
SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop",
)  # fmt: skip


class UsageError(Exception):
    """The command line can not be honoured as it was typed; exit code 2."""


class Parser(argparse.ArgumentParser):
    """A parser whose flags may also come from the environment; flags win."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def flag(self, *names: str, **options: Any) -> None:
        """Add a flag; SMOLRUN_ and a long name of it, in capitals, is its variable."""
        action = self.add_argument(*names, **options)
        for name in names:
            variable = PREFIX + name[2:].replace("-", "_").upper()
            if name.startswith("--") and (value := os.environ.get(variable)) is not None:
                self.set_defaults(**{action.dest: self._from_environment(variable, value, action)})
                return

    def _from_environment(self, variable: str, value: str, action: argparse.Action) -> object:
        try:
            if action.nargs == 0 and isinstance(action.const, bool):
                return action.const if _switch(value) else not action.const
            if action.nargs == 0:  # counted
                return int(value or 0)
            convert: Callable[[str], Any] = action.type if callable(action.type) else str
            converted = convert(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.error(f"environment variable {variable}: {error}")
        if action.choices is not None and converted not in action.choices:
            choices = ", ".join(map(str, action.choices))
            self.error(f"environment variable {variable}: {value!r} is not one of {choices}")
        return [converted] if isinstance(action, argparse._AppendAction) else converted

    def error(self, message: str) -> NoReturn:
        """One line, and where help is to be had; exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _switch(value: str) -> bool:
    if value.lower() in _ON:
        return True
    if value.lower() in _OFF:
        return False
    raise ValueError(f"expected 1 or 0, found {value!r}")


def add_output(parser: Parser) -> None:
    """Flags of every verb."""
    parser.flag("-q", "--quiet", action="store_true", help="no notes, progress or statistics")
    parser.flag("-v", "--verbose", action="count", default=0, help="say more; -v -v: tracebacks")
    parser.flag(
        "--color", choices=("auto", "on", "off"), default="auto", help="default: on terminals"
    )


def add_model(parser: Parser) -> None:
    """Flags that name a model. SMOLRUN_MODEL gives way to a model named in any other way."""
    parser.add_argument(
        "-m", "--model", "-hf", "--hf-repo", dest="model", metavar="MODEL",
        help="a path, an alias such as smollm3-3b:q4_k_m, or user/repo[:quant] on the Hub; "
        "default: SMOLRUN_MODEL, else smollm2-135m",
    )  # fmt: skip
    parser.flag("--offline", action="store_true", help="ask no network; use what is there")


def add_engine(parser: Parser) -> None:
    """Flags of verbs that run a model."""
    parser.flag(
        "-c", "--ctx-size", "--context", dest="context_size", type=positive, metavar="N",
        help="most tokens of prompt and answer; default: what model and memory allow, up to 32768",
    )  # fmt: skip
    add_reading(parser)


def add_requests(parser: Parser, parallel: int, helped: str) -> None:
    """Flags of verbs that answer HTTP requests, or a file of them."""
    parser.flag("-np", "--parallel", type=positive, default=parallel, metavar="N",
                help=f"{helped} (default {parallel})")  # fmt: skip
    parser.flag("--alias", "--served-model-name", dest="alias", action="append", metavar="NAME",
                help="what requests may call the model; may be repeated")  # fmt: skip


def add_activations(parser: Parser) -> None:
    """How inputs of products are rounded."""
    parser.flag(
        "--activations", choices=("fast", "exact"), default="fast",
        help="inputs of quantized weights mostly in 8 bits, of F16 and BF16 in 16; or in 16 bits "
        "and float32: slower, more faithful; default: fast",
    )  # fmt: skip


def add_text(parser: Parser) -> None:
    """What quality is measured on."""
    parser.flag("--text", type=Path, metavar="FILE",
                help="UTF-8 text to read; default: 3200 words of English")  # fmt: skip
    parser.flag("--window", type=positive, metavar="N", default=512,
                help="tokens read from an empty cache at a time (default 512)")  # fmt: skip


def text_of(arguments: argparse.Namespace) -> str:
    """What --text names without the newline at its end, or else the sample that comes with it."""
    from smolrun.measure.text import sample_text

    path: Path | None = arguments.text
    return sample_text() if path is None else read_text(path).removesuffix("\n")


def add_reading(parser: Parser) -> None:
    """How weights are held and multiplied, for verbs that measure."""
    parser.flag("-t", "--threads", type=positive, metavar="N", help="default: see smolrun doctor")
    parser.flag(
        "--dtype", choices=("auto", "f32", "f16", "bf16"), default="auto",
        help="what unquantized weights are held in; default: as stored",
    )  # fmt: skip
    add_activations(parser)


def reading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Model` that `add_reading` stands for."""
    return {name: getattr(arguments, name) for name in ("threads", "dtype", "activations")}


def add_form(parser: Parser) -> None:
    """How tables are printed."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as one JSON object")
    form.add_argument("--markdown", action="store_true",
                      help="print Markdown, as where stdout is no terminal")  # fmt: skip


def print_found(
    found: Mapping[str, object],
    parts: Iterable[Table | str],
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """Print in the form that `add_form` asks for: `found` as JSON, or the tables of `parts`."""
    import json

    from smolrun.measure.tables import markdown, print_parts, rich_console

    if arguments.json:
        console.print(json.dumps(found, ensure_ascii=False, indent=1))
    elif arguments.markdown or not is_terminal(console.out):
        console.write(markdown(parts))
    else:
        print_parts(parts, rich_console(console.out))


def add_sampling(parser: Parser) -> None:
    """Flags that say how tokens are chosen; left out, the model's own values hold."""
    group = parser
    group.flag(
        "-n", "--max-tokens", "--n-predict", dest="max_tokens", type=int, metavar="N",
        help="most tokens to generate; -1: what the context leaves (default)",
    )  # fmt: skip
    group.flag("--temp", "--temperature", dest="temperature", type=float, metavar="X",
               help="0 always takes the likeliest token")  # fmt: skip
    group.flag("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    group.flag("--top-p", type=float, metavar="P", help="the likeliest that together reach P")
    group.flag("--min-p", type=float, metavar="P", help="at least P times the likeliest")
    group.flag("--repeat-penalty", type=float, metavar="X", help="1 is off")
    group.flag("--presence-penalty", type=float, metavar="X", help="0 is off")
    group.flag("--frequency-penalty", type=float, metavar="X", help="0 is off")
    group.flag("--logit-bias", type=logit_bias, action="append", metavar="ID+X|ID-X",
               help="add to the logit of a token; may be repeated")  # fmt: skip
    group.flag("--seed", type=seed, metavar="N", help="the same answer again; -1: random")
    group.flag("--stop", action="append", metavar="TEXT",
               help="end the answer before TEXT; may be repeated")  # fmt: skip


def add_conversation(parser: Parser) -> None:
    """Flags that shape what the model is given."""
    parser.flag("-s", "--system", metavar="TEXT", help="the system prompt")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--think", action="store_true", default=None, help="reason before answering")
    group.add_argument("--no-think", dest="think", action="store_false", help="answer at once")
    parser.set_defaults(think=None)
    if (value := os.environ.get(PREFIX + "THINK")) is not None:
        try:
            parser.set_defaults(think=_switch(value))
        except ValueError as error:
            parser.error(f"environment variable {PREFIX}THINK: {error}")
    parser.flag("--date", type=date, metavar="YYYY-MM-DD",
                help="what the model takes for today")  # fmt: skip


def add_budget(parser: Parser) -> None:
    """How long a model may think, for verbs that answer."""
    parser.flag(
        "--thinking-budget", "--reasoning-budget", dest="thinking_budget", type=int, metavar="N",
        help="most tokens of thinking; it ends at the end of a sentence, and an answer follows; "
        "0: none, -1: as many as it takes",
    )  # fmt: skip


def add_structure(parser: Parser) -> None:
    """What form an answer must have."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-j", "--json-schema", metavar="SCHEMA",
                       help="answer in JSON of this JSON Schema: its text, or @FILE")  # fmt: skip
    group.add_argument("--grammar", metavar="GRAMMAR",
                       help="answer by a grammar, Lark's or GBNF: its text, or @FILE")  # fmt: skip
    group.add_argument("--regex", metavar="PATTERN", help="answer with a match of an expression")


def structure_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the API that `add_structure` stands for."""
    import json

    if arguments.json_schema is not None:
        text = _text_or_file(arguments.json_schema)
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--json-schema is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise UsageError("--json-schema: expected an object")
        return {"response_format": schema}
    if arguments.grammar is not None:
        return {"grammar": _text_or_file(arguments.grammar)}
    return {} if arguments.regex is None else {"regex": arguments.regex}


def _text_or_file(text: str) -> str:
    return read_text(Path(text[1:])) if text.startswith("@") else text


def add_prompt(parser: Parser) -> None:
    """Where a prompt comes from."""
    parser.add_argument(
        "words", nargs="*", metavar="[MODEL] [PROMPT]",
        help="a model (a path, an alias, user/repo[:quant]), then the prompt; either alone will do",
    )  # fmt: skip
    parser.flag("-p", "--prompt", metavar="TEXT", help="the prompt")
    parser.flag("-f", "--file", type=Path, metavar="PATH",
                help="append a text file to the prompt; - is stdin")  # fmt: skip


def positive(text: str) -> int:
    """A count of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return value


def seed(text: str) -> int | None:
    """A seed; -1 is a random one."""
    value = int(text)
    return None if value == -1 else value


def date(text: str) -> datetime.date:
    """A date as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected YYYY-MM-DD, found {text!r}") from None


def logit_bias(text: str) -> tuple[int, float]:
    """`15043+1.5` or `15043-1`: a token id and what is added to its logit."""
    for sign in "+-":
        token, found, value = text.partition(sign)
        if found and token.strip().isdecimal():
            return int(token), float(sign + value)
    raise argparse.ArgumentTypeError(f"expected ID+BIAS or ID-BIAS, found {text!r}")


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling arguments of the API that were given."""
    given = {name: getattr(arguments, name) for name in SAMPLING}
    if given["logit_bias"]:
        given["logit_bias"] = dict(given["logit_bias"])
    if given["max_tokens"] is not None and given["max_tokens"] < 0:
        given["max_tokens"] = None
    return {name: value for name, value in given.items() if value is not None}


def console_of(arguments: argparse.Namespace) -> Console:
    """The console that the flags ask for."""
    return Console(arguments.color, arguments.quiet, arguments.verbose)


def model_and_words(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The model that was meant, and the words that are left for the prompt.

    The first word is a model where it looks like one (see `names.looks_like_model`) and -m names
    none.
    """
    from smolrun.files.names import DEFAULT_MODEL, looks_like_model

    words = list(getattr(arguments, "words", []))
    if arguments.model:
        return arguments.model, words
    if words and looks_like_model(words[0]):
        return words[0], words[1:]
    return os.environ.get(PREFIX + "MODEL") or DEFAULT_MODEL, words


def prompt_of(
    arguments: argparse.Namespace,
    words: Sequence[str],
    *,
    stdin: bool = True,
    strip: bool = True,
) -> str | None:
    """The prompt from words, -p, -f and, where it is no terminal, stdin; None if there is none.

    `strip` takes the newlines off the end of every part, as editors and `echo` put them there.
    """
    parts = [" ".join(words)] if words else []
    if arguments.prompt is not None:
        parts.append(arguments.prompt)
    file: Path | None = arguments.file
    from_stdin = file is not None and str(file) == "-"
    if file is not None and not from_stdin:
        parts.append(read_text(file))
    if from_stdin or (stdin and sys.stdin is not None and not is_terminal(sys.stdin)):
        parts.append(read_stdin())
    if strip:
        parts = [part.rstrip("\r\n") for part in parts if part.strip()]
    else:
        parts = [part for part in parts if part]
    # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
    text = "\n\n".join(parts).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text or None


def read_stdin() -> str:
    """All of stdin. UsageError where it is not text, or too much of it."""
    return _decoded(sys.stdin.buffer.read(MAX_TEXT_BYTES + 1), "stdin")


def read_text(path: Path) -> str:
    """A text file, whole. UsageError where it can not be read."""
    try:
        with path.expanduser().open("rb") as file:
            text = _decoded(file.read(MAX_TEXT_BYTES + 1), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(data: bytes, origin: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"{origin} has more than {MAX_TEXT_BYTES >> 20} MiB; take a part of it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{origin} is not UTF-8 text (byte {error.start})") from None


def resolved(name: str, arguments: argparse.Namespace, console: Console) -> Path:
    """The files of a model, fetched with a line of progress if need be."""
    from smolrun.files.names import resolve

    try:
        return resolve(name, progress=console.downloading, offline=arguments.offline or None)
    except ModelNotFoundError as error:
        if getattr(arguments, "words", None) and name == arguments.words[0]:
            raise ModelNotFoundError(f"{error} (if this was meant as a prompt, use -p)") from error
        raise
    finally:
        console.clear_progress()
