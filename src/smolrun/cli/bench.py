"""How fast models run on this machine, and how close that is to what it can do.

First the machine's ceilings, measured on the spot. Then, for every model: reading a prompt,
writing with an empty and with a full context, many sequences at once, the time from the start of a
process to its first token, and its peak memory. "limit" says what bounds the work, and "of ceiling"
how close it comes: the least time that the ceilings allow, over the median time taken.

The reference reading (NumPy) confirms what the model wrote; --no-check saves that time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from smolrun import __version__
from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console, is_terminal

EPILOG = """\
examples:
  smolrun bench
  smolrun bench a.gguf b.gguf --markdown
  smolrun bench smollm3-3b:q4_k_m -p 256 -n 32 -d 0,4096,16384 -r 3 --no-check
  smolrun bench --quick --profile --trace steps.json
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun bench`."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="a path, an alias, user/repo[:quant]"
    )
    options.add_model(parser)
    parser.flag("-p", "--prompt-tokens", type=counts, metavar="N,N", default=(512,),
                help="tokens of prompts; 0: no prefill (default 512)")  # fmt: skip
    parser.flag("-n", "--decode-tokens", type=counts, metavar="N,N", default=(128,),
                help="tokens to write; 0: no decode (default 128)")  # fmt: skip
    parser.flag("-d", "--depth", type=counts, metavar="N,N", default=(0, 4096),
                help="tokens in the cache before that (default 0,4096)")  # fmt: skip
    parser.flag("--sequences", type=counts, metavar="N,N", default=(1, 4, 8, 16, 32),
                help="sequences that decode together; 0: none (default 1,4,8,16,32)")  # fmt: skip
    parser.flag("-r", "--repetitions", type=options.positive, metavar="N", default=5,
                help="times that each is measured (default 5)")  # fmt: skip
    options.add_reading(parser)
    parser.flag("--quick", action="store_true", help="fewer tokens and repetitions")
    parser.flag("--profile", action="store_true",
                help="where the time of a step goes, by operation")  # fmt: skip
    parser.flag("--trace", type=Path, metavar="FILE",
                        help="write steps and operations as a Chrome trace")  # fmt: skip
    parser.flag("--no-check", dest="check", action="store_false",
                        help="leave the reference reading out")  # fmt: skip
    parser.flag("--no-start", dest="start", action="store_false",
                        help="leave the time to the first token out")  # fmt: skip
    options.add_form(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb; 1 where a model did not write what the reference does."""
    from smolrun.engine.machine import machine_report
    from smolrun.engine.native import resolve_isa
    from smolrun.measure.bench import Plan, measure_model
    from smolrun.measure.ceilings import CeilingMeter
    from smolrun.measure.report import Report, load_average
    from smolrun.measure.tables import rich_console

    names = ([arguments.model] if arguments.model else []) + arguments.models
    names = names or [options.model_and_words(arguments)[0]]
    if arguments.trace is not None and len(names) > 1:
        raise UsageError("--trace takes one model")
    paths = [options.resolved(name, arguments, console) for name in names]

    plan = Plan(
        prompt_tokens=arguments.prompt_tokens,
        decode_tokens=arguments.decode_tokens,
        depths=arguments.depth,
        sequences=tuple(count for count in arguments.sequences if count),
        repetitions=arguments.repetitions,
        start=arguments.start,
        check=arguments.check,
        profile=arguments.profile,
        trace=arguments.trace is not None,
    )
    plan = plan.quick() if arguments.quick else plan
    load = load_average()
    machine = machine_report()
    threads = arguments.threads or machine.threads
    console.progress("ceilings of this machine")
    meter = CeilingMeter(resolve_isa(), threads)
    meter.measure(samples=40)
    models = []
    for path in paths:
        found = measure_model(
            path,
            plan,
            meter,
            dtype=arguments.dtype,
            activations=arguments.activations,
            progress=console.progress,
        )
        models.append(found)
        if arguments.trace is not None:
            arguments.trace.write_text(json.dumps(found.trace))
    meter.measure(samples=40)
    report = Report(__version__, machine.cpu_name, meter.ceilings, load, models)
    console.clear_progress()
    if arguments.json:
        console.print(report.as_json())
    elif arguments.markdown or not is_terminal(console.out):
        console.write(report.as_markdown())
    else:
        report.print_tables(rich_console(console.out))
    return 0 if all(model.stamp is None or model.stamp.correct for model in report.models) else 1


def counts(text: str) -> tuple[int, ...]:
    """`0,4096`: counts, in the order they were given, each once."""
    found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 0, found {text}")
    return found
