"""Turn a safetensors folder into a GGUF file, or a GGUF file into a safetensors folder."""

from __future__ import annotations

import argparse

from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console, human_bytes

EPILOG = """\
Norms and biases stay F32 in a GGUF file, where every program expects them so. The metadata, the
tokenizer and the order of rows are those of llama.cpp's converter.

examples:
  smolrun convert ./my-finetune my-finetune.gguf
  smolrun convert HuggingFaceTB/SmolLM3-3B:safetensors smollm3.gguf --type f16
  smolrun convert smollm2-135m.q8_0.gguf ./smollm2-135m --type bf16
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun convert`."""
    parser.add_argument("model", metavar="SRC", help="a path, an alias or user/repo[:quant]")
    parser.add_argument("target", metavar="DST", help="a name that ends in .gguf, or a folder")
    parser.flag(
        "--type", dest="dtype", type=str.lower, choices=("auto", "f32", "f16", "bf16"),
        default="auto", help="of the matrices; default: as stored, and f32 for quantized ones",
    )  # fmt: skip
    parser.flag("--force", action="store_true", help="replace what is at DST")
    parser.flag("--offline", action="store_true", help="ask no network; use what is there")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    from smolrun.api.conversion import convert

    path = options.resolved(arguments.model, arguments, console)
    converted = convert(
        path,
        arguments.target,
        dtype=arguments.dtype,
        overwrite=arguments.force,
        progress=lambda done, total: console.writing(arguments.target, done, total),
    )
    console.note(f"{converted.dtype.value}, {human_bytes(converted.nbytes)}")
    console.print(str(converted.path))
    return 0
