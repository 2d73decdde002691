"""What this machine offers, what smolrun makes of it, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from typing import Any

from smolrun import __version__
from smolrun.cli import options
from smolrun.cli.options import Parser
from smolrun.cli.terminal import Console, human_bytes, table

_VARIABLES = (
    "SMOLRUN_ISA", "SMOLRUN_THREADS", "SMOLRUN_MODEL", "SMOLRUN_CACHE", "SMOLRUN_OFFLINE",
    "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
)  # fmt: skip


def version_line() -> str:
    """`smolrun 0.1.0 (avx512)`: the version and the instruction set in use."""
    from smolrun.engine.native import resolve_isa

    return f"smolrun {__version__} ({resolve_isa()}, {platform.machine()})"


def add_arguments(parser: Parser) -> None:
    """Flags of `smolrun doctor`."""
    parser.flag("--json", action="store_true", help="print everything as one JSON object")
    options.add_output(parser)


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Run the verb."""
    report = report_values()
    if arguments.json:
        console.print(json.dumps(report, ensure_ascii=False, indent=1))
        return 0
    machine = report["machine"]
    cores = f"{machine['physical_cores']} cores, {machine['affinity']} CPUs to run on"
    others = ", ".join(isa for isa in machine["isas"] if isa != machine["isa"])
    rows = [
        ("smolrun", f"{report['version']}, Python {report['python']}, {report['system']}"),
        ("processor", f"{machine['cpu_name']}; {cores}"),
        (
            "instruction set",
            f"{machine['isa']}: {machine['isa_why']}" + (f" (also {others})" if others else ""),
        ),
        ("threads", f"{machine['threads']}: {machine['threads_why']}"),
        ("memory", f"{human_bytes(machine['memory_limit'])}: {machine['memory_limit_why']}"),
        (
            "memory left",
            f"{human_bytes(machine['memory_available'])}: {machine['memory_available_why']}",
        ),
        ("models", _models(report)),
        ("Hub's cache", report["hub_cache"]),
        ("own cache", report["own_cache"]),
        ("default model", report["default_model"] or "not here yet; smolrun pull fetches it"),
    ]
    rows += [("set", f"{name}={value}") for name, value in report["environment"].items()]
    console.print(table(rows))
    return 0


def report_values() -> dict[str, Any]:
    """Everything that `--json` prints."""
    from smolrun.engine.machine import machine_report
    from smolrun.errors import SmolrunError
    from smolrun.files import cache
    from smolrun.files.names import DEFAULT_MODEL, cached_models, resolve

    models = cached_models()
    try:
        default = str(resolve(DEFAULT_MODEL, offline=True))
    except SmolrunError:
        default = None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "machine": dataclasses.asdict(machine_report()),
        "models": len(models),
        "models_bytes": sum(model.size_bytes for model in models),
        "hub_cache": str(cache.hub_folder()),
        "own_cache": str(cache.cache_folder()),
        "default_model": default,
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _models(report: dict[str, Any]) -> str:
    if not report["models"]:
        return "none downloaded"
    return f"{report['models']} downloaded, {human_bytes(report['models_bytes'])} (smolrun list)"
