"""The rules of the layout (docs/architecture.md), held by a test."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import SECONDS

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "src" / "smolrun"
CORE = REPOSITORY / "src" / "core"

# What each room may import, beside itself; "" is the package's __init__.
MAY_IMPORT = {
    "": {"api", "errors"},
    "cli": {
        "api",
        "engine",
        "model",
        "text",
        "files",
        "quant",
        "errors",
        "measure",
        "server",
        "integrations",
    },
    "integrations": {"api", "server", "errors"},
    "server": {"api", "engine", "text", "errors"},
    "measure": {"api", "engine", "model", "text", "files", "quant", "errors"},
    "api": {"engine", "model", "text", "files", "quant", "errors"},
    "engine": {"model", "text", "files", "quant", "errors"},
    "text": {"files", "errors"},
    "files": {"model", "quant", "errors"},
    "model": {"quant", "errors"},
    "quant": {"errors"},
    "errors": set(),
}
NATIVE_USERS = {"engine", "files"}
NATIVE_MODULES = {"quant/native.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts[0] == "__init__" else parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "smolrun" or len(parts) == 1:
            continue
        if parts[1] == "_core":
            module = str(path.relative_to(PACKAGE))
            assert room in NATIVE_USERS or module in NATIVE_MODULES, (
                f"{path} imports the native core"
            )
        elif (PACKAGE / parts[1]).exists() or (PACKAGE / f"{parts[1]}.py").exists():
            assert parts[1] == room or parts[1] in MAY_IMPORT[room], f"{path} imports {name}"


def test_the_architecture_sees_only_its_builder_and_config() -> None:
    found = {n for n in imports_of(PACKAGE / "model" / "llama.py") if n.startswith("smolrun.")}
    assert all(n.startswith(("smolrun.model.program", "smolrun.model.config")) for n in found)


def test_the_architecture_is_one_short_file() -> None:
    assert len((PACKAGE / "model" / "llama.py").read_text().splitlines()) <= 120


def test_no_room_reads_what_can_run_code() -> None:
    forbidden = re.compile(r"\bpickle\b|torch\.load|\beval\(|\bexec\(|\bmarshal\b|yaml\.load")
    for path in modules():
        found = forbidden.search(path.read_text())
        assert found is None, f"{path}: {found and found.group()}"


def test_torch_is_not_needed_at_run_time() -> None:
    for path in modules():
        assert not any(
            n.split(".")[0] in {"torch", "transformers", "gguf"} for n in imports_of(path)
        )


def includes_of(path: Path) -> list[str]:
    return re.findall(r'#include\s+[<"]([^">]+)[">]', path.read_text())


def test_kernels_know_no_threads_and_the_core_no_model() -> None:
    for path in sorted((CORE / "kernels").iterdir()):
        assert not {"thread", "atomic", "mutex", "threads.h", "program.h"} & set(includes_of(path))
    for path in sorted(CORE.rglob("*.*")):
        found = re.search(r"smollm|llama|gguf_|safetensors", path.read_text(), re.IGNORECASE)
        assert found is None, f"{path} names {found and found.group()}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, smolrun; heavy = {'numpy', 'tokenizers', 'jinja2', 'safetensors', "
        "'huggingface_hub', 'rich', 'prompt_toolkit'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert done.stdout.strip() == "[]"
