"""Make a GGUF file of smaller weights."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from smolrun.cli import options
from smolrun.cli.options import Parser, UsageError
from smolrun.cli.terminal import Console, human_bytes

if TYPE_CHECKING:
    from smolrun.api.quantization import Quantized
    from smolrun.measure.fit import Size

EPILOG = """\
TYPE is one of llama.cpp's: q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, iq4_nl, iq4_xs,
q4_1, q4_0, q3_k_l, q3_k_m, q3_k_s, q2_k, or f32, f16, bf16; each weight gets the type that it gets
there. Rows of 576 and 960 weights (135M, 360M) are no whole blocks of K types, so most weights of
these models get another type; what became of each is told, and written in the file.

examples:
  smolrun quantize smollm2-135m.f16.gguf q4_k_m
  smolrun quantize ./my-finetune my-finetune.gguf q5_k_m --imatrix my-finetune.imatrix.gguf
  smolrun quantize smollm3.gguf q4_k_m --tensor-type 'ffn_down=q6_k' --dry-run
  smolrun quantize smollm2-135m.f16.gguf --fit 80MB
"""


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun quantize`."""
    parser.add_argument(
        "words", metavar="SRC [DST] TYPE", nargs="+",
        help="a path, an alias or user/repo[:quant]; a .gguf file (default NAME.TYPE.gguf here); "
        "a type in any case, see below, but not beside --fit",
    )  # fmt: skip
    parser.flag(
        "--fit", type=_size, metavar="SIZE",
        help="choose each weight's type so that the file has at most SIZE (80MB, 1.9GB, 4.5bpw: "
        "bits per weight) and loses least on a text, which takes minutes",
    )  # fmt: skip
    parser.flag("--text", type=Path, metavar="FILE",
                help="what --fit measures with; default: 3200 words of English")  # fmt: skip
    parser.flag(
        "--tensor-type", type=_tensor_type, action="append", default=[], metavar="PATTERN=TYPE",
        help="of the weights in whose GGUF names the regular expression is found; may be repeated",
    )  # fmt: skip
    parser.flag("--imatrix", metavar="FILE", help="importance of columns, from smolrun imatrix")
    parser.flag("--strict", action="store_true",
                help="fail where a weight can not take its type")  # fmt: skip
    parser.flag("--dry-run", action="store_true", help="only tell what would be written")
    parser.flag("--force", action="store_true", help="replace what is at DST")
    parser.flag("-t", "--threads", type=options.positive, metavar="N",
                help="default: see smolrun doctor")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    parser.flag("--offline", action="store_true", help="ask no network; use what is there")
    options.add_output(parser)


def _size(text: str) -> Size:
    from smolrun.measure.fit import Size

    try:
        return Size.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tensor_type(text: str) -> tuple[str, str]:
    pattern, equals, weight_type = text.rpartition("=")
    if not pattern or not weight_type:
        raise argparse.ArgumentTypeError(f"expected PATTERN=TYPE, found {text!r}")
    return pattern, weight_type


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    words = list(arguments.words)
    kind = None if arguments.fit else words.pop()
    if not 1 <= len(words) <= 2:
        shape = "SRC [DST]" if arguments.fit else "SRC [DST] TYPE"
        raise UsageError(f"quantize takes {shape}, found {' '.join(arguments.words)}")
    if kind is not None and arguments.text is not None:
        raise UsageError("--text is what --fit measures with; leave it away, or give --fit")
    path = options.resolved(words[0], arguments, console)
    target = words[1] if len(words) > 1 else None
    if kind is None:
        made = _to_fit(path, target, arguments, console)
    else:
        made = _as(path, target, kind, arguments, console)
    for line in described(made):
        console.note(line)
    if arguments.json:
        console.print(json.dumps({**asdict(made), "path": str(made.path)}, indent=2))
    else:
        console.print(str(made.path))
    return 0


def _as(
    path: Path, target: str | None, kind: str, arguments: argparse.Namespace, console: Console
) -> Quantized:
    from smolrun.api.quantization import quantize

    return quantize(
        path,
        target,
        kind,
        tensor_types=dict(arguments.tensor_type),
        imatrix=arguments.imatrix,
        strict=arguments.strict,
        overwrite=arguments.force,
        dry_run=arguments.dry_run,
        threads=arguments.threads,
        progress=lambda done, total: console.writing("weights", done, total),
    )


def _to_fit(
    path: Path, target: str | None, arguments: argparse.Namespace, console: Console
) -> Quantized:
    from smolrun.files.imatrix import read_imatrix
    from smolrun.measure.fit import quantize_to_fit

    if arguments.tensor_type or arguments.strict:
        raise UsageError("--fit chooses all types itself; leave --tensor-type and --strict away")
    made, fit = quantize_to_fit(
        path,
        target,
        arguments.fit,
        options.text_of(arguments),
        arguments.text.name if arguments.text else "smolrun's sample of English",
        importance=read_imatrix(arguments.imatrix) if arguments.imatrix else None,
        overwrite=arguments.force,
        dry_run=arguments.dry_run,
        threads=arguments.threads,
        measuring=lambda done, total: console.working("sensitivities", done, total),
        progress=lambda done, total: console.writing("weights", done, total),
    )
    console.note(f"predicted KL divergence {fit.predicted_kl:.2e}")
    if fit.mix is not None:
        console.note(f"no other choice of types was found to lose clearly less than {fit.mix.name}")
    return made


def described(made: Quantized) -> list[str]:
    """What was done, in lines for a terminal."""
    shares = ", ".join(f"{name} {100 * n / made.weights:.1f} %" for name, n in made.types.items())
    lines = [
        f"{made.mix}: {human_bytes(made.nbytes)}, {made.bits_per_weight:.2f} bits per weight "
        f"({shares})"
    ]
    if made.requantized:
        lines.append(
            f"{made.requantized} matrices were quantized already; a file of unquantized weights "
            "would lose less"
        )
    if made.without_importance:
        lines.append(
            f"the imatrix says nothing of {len(made.without_importance)} matrices, "
            f"{made.without_importance[0]} for one"
        )
    if made.substitutions:
        lines.append(
            f"{len(made.substitutions)} matrices can not take their type, as its blocks do not "
            "fill their rows:"
        )
        groups: dict[str, list[str]] = {}
        for item in made.substitutions:
            change = f"{item.wanted.value} -> {item.type.value} (rows of {item.columns})"
            groups.setdefault(change, []).append(item.name)
        lines += [f"  {change}: {_in_layers(names)}" for change, names in groups.items()]
    return lines


def _in_layers(names: list[str]) -> str:
    """Names of weights, those of layers put together: "token_embd, attn_v of layers 0-2, 5"."""
    layers: dict[str, list[int]] = {}
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        found = layers.setdefault(parts[-1], [])
        if len(parts) == 3:
            found.append(int(parts[1]))
    groups: dict[str, list[str]] = {}
    for kind, numbers in layers.items():
        groups.setdefault(_ranges(numbers), []).append(kind)
    return "; ".join(
        ", ".join(kinds) + (f" of layers {numbers}" if numbers else "")
        for numbers, kinds in groups.items()
    )


def _ranges(numbers: list[int]) -> str:
    """Numbers that rise, runs put together: "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
