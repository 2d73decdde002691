"""The formats of a model in one table: how large, how fast and how good each is on this machine.

Formats that are not there yet are made first. Quality is measured against MODEL itself, so it
should be the best file that there is: F16, BF16 or a folder of safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console

EPILOG = """\
examples:
  smolrun formats smollm2-135m-f16.gguf
  smolrun formats SmolLM3-3B/ --formats f16,q8_0,q6_k,q4_k_m --output made/
  smolrun formats model.gguf --markdown --plot formats.svg
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun formats`."""
    parser.add_argument("model", metavar="MODEL", help="a path, an alias or user/repo[:quant]")
    parser.flag("--formats", type=_names, metavar="A,B", default=("F32", "F16", "Q8_0", "Q4_K_M"),
                help="mixes and weight types (default F32,F16,Q8_0,Q4_K_M)")  # fmt: skip
    parser.flag("-o", "--output", type=Path, metavar="FOLDER",
                help="where the files are, or are made (default: NAME-formats)")  # fmt: skip
    parser.flag("--offline", action="store_true", help="ask no network; use what is there")
    options.add_text(parser)
    options.add_reading(parser)
    parser.flag("-r", "--repetitions", type=options.positive, metavar="N", default=3,
                help="times that speed is measured (default 3)")  # fmt: skip
    parser.flag("--plot", type=Path, metavar="FILE",
                help="draw quality against size; a .svg or .png file")  # fmt: skip
    options.add_form(parser)
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    import dataclasses

    from smolrun.engine.machine import machine_report
    from smolrun.engine.native import resolve_isa
    from smolrun.measure.ceilings import CeilingMeter
    from smolrun.measure.formats import PLAN, measure_formats, model_stem
    from smolrun.measure.plot import SUFFIXES, check_plot, save_plot

    plot: Path | None = arguments.plot
    if plot is not None and plot.suffix not in SUFFIXES:
        raise UsageError(f"--plot: expected a name that ends in .svg or .png, found {plot}")
    if plot is not None:
        check_plot(plot)
    text = options.text_of(arguments)
    source = options.resolved(arguments.model, arguments, console)
    folder = arguments.output or Path(f"{model_stem(source)}-formats")
    meter = CeilingMeter(resolve_isa(), arguments.threads or machine_report().threads)
    meter.measure(samples=5)
    found = measure_formats(
        source,
        folder,
        arguments.formats,
        text,
        meter,
        window=arguments.window,
        plan=dataclasses.replace(PLAN, repetitions=arguments.repetitions),
        progress=console.progress,
        dtype=arguments.dtype,
        activations=arguments.activations,
    )
    console.clear_progress()
    options.print_found(found.as_dict(), found.parts(), arguments, console)
    if plot is not None:
        save_plot(found, plot)
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
