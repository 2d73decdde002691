"""Tries a stranger's chat template in a process of its own, where it can do no harm.

Compiling and rendering are bounded by `smolrun.text.sandbox` already; what those bounds overlook
meets the limits of the process here, at load, instead of the user's process later.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from smolrun.errors import TemplateError

_PROCESSOR_SECONDS = 2
_MEMORY = 512 * 1024 * 1024  # bytes of address space; Python with jinja2 takes about 60 MB
_WALL_SECONDS = 60  # a loaded machine may give a process little time

# The child gets this process's import path, so that it finds the same smolrun and jinja2, and
# otherwise nothing from the environment.
_COMMAND = (
    "import json, sys; given = json.load(sys.stdin); sys.path[:] = given['path']; "
    "from smolrun.text.probe import child; child(given)"
)

_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")  # to find libpython by

_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}


def _conversations() -> list[dict[str, object]]:
    user = {"role": "user", "content": "Hello"}
    answer = {"role": "assistant", "content": "Hello. How can I help?"}
    alternating = [user, answer] * 4 + [user]
    system = {"role": "system", "content": "Be brief."}
    tool = {"role": "tool", "content": "1"}
    return [
        {"messages": [user]},
        {"messages": alternating},
        {"messages": [system, *alternating]},
        {"messages": [system, user], "enable_thinking": False},
        {"messages": [system, user, answer, tool], "tools": [_TOOL], "xml_tools": [_TOOL]},
    ]


def probe(source: str, variables: Mapping[str, object], origin: str) -> None:
    """Compiles and renders a template in a child process with little time and memory.

    Raises:
        TemplateError: the template is broken, reaches for what it may not, takes more than it
            may, or renders none of a few plain conversations.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return  # there is no interpreter to start: the sandbox's own bounds remain
    path = [str(Path(__file__).parents[2]), *sys.path]
    given = json.dumps({"path": path, "source": source, "variables": dict(variables)})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", _COMMAND],
            input=given.encode(),
            capture_output=True,
            timeout=_WALL_SECONDS,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(f"{origin}: the chat template does not end; it is refused") from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise TemplateError(
            f"{origin}: the chat template is refused: its trial, within {_PROCESSOR_SECONDS} s of "
            f"processor time and {_MEMORY >> 20} MB of memory, ended with exit status "
            f"{done.returncode}" + (f" ({lines[-1]})" if lines else "")
        )
    reason = json.loads(done.stdout)
    if reason is not None:
        raise TemplateError(f"{origin}: the chat template {reason}; it is refused")


def child(given: Mapping[str, object]) -> None:
    """What the child process does: answers null or a reason on standard output."""
    _limit_this_process()
    json.dump(_reason(str(given["source"]), given["variables"]), sys.stdout)


def _limit_this_process() -> None:
    try:
        import resource
    except ImportError:  # Windows has none; the sandbox's own bounds remain
        return
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, _PROCESSOR_SECONDS, _PROCESSOR_SECONDS + 1),
        (resource.RLIMIT_AS, _MEMORY, _MEMORY),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        # Not every system takes every limit, and stricter ones may be in force already.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (soft, hard))


def _reason(source: str, variables: object) -> str | None:
    from jinja2.exceptions import SecurityError
    from jinja2.exceptions import TemplateError as JinjaError

    from smolrun.text.sandbox import environment

    assert isinstance(variables, dict)
    try:
        template, _ = environment().prepare(source)
    except SecurityError as error:
        return str(error)
    except (JinjaError, SyntaxError, RecursionError, MemoryError) as error:
        return f"is not valid Jinja: {error}"
    refused = "renders nothing"
    rendered = False
    for conversation in _conversations():
        given = variables | {"add_generation_prompt": True} | conversation
        try:
            environment().run(template, given, 4 * len(source) + 65536)
            rendered = True
        except SecurityError as error:
            return str(error)
        except (RecursionError, MemoryError) as error:
            return f"does not end: {error}"
        except Exception as error:  # it may refuse some roles; not all of the conversations
            refused = f"fails: {error}"
    return None if rendered else refused
