"""A process that answers once, as a user's would: time to the first token, and peak memory.

`python -m smolrun.measure.child OPTIONS` is what `first_answer` starts; OPTIONS is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolrun.engine.native import DEFAULT_ACTIVATIONS
from smolrun.errors import SmolrunError

PROMPT = "Why is the sky blue?"
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class ChildOptions:
    """What the child is told."""

    path: str
    threads: int
    isa: str
    dtype: str
    activations: str = DEFAULT_ACTIVATIONS


@dataclass(frozen=True)
class FirstAnswer:
    """What one process took."""

    first_token_seconds: float  # from starting the process to having read its first token
    peak_bytes: int  # most resident memory, mapped files included


def first_answer(options: ChildOptions) -> FirstAnswer:
    """Start a process that answers a short question. SmolrunError where it fails."""
    return timed([sys.executable, "-m", __name__, json.dumps(asdict(options))])


def timed(command: list[str]) -> FirstAnswer:
    """Run a command that prints a line with its first token, then what `main` ends with.

    SmolrunError where it fails.
    """
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - begin
            # Not `communicate`: it reads past what `readline` has already buffered.
            rest = process.stdout.read()
        errors.seek(0)
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode or not line:
        raise SmolrunError(f"the process that was to answer failed: {' '.join(last)}")
    return FirstAnswer(seconds, int(json.loads(rest)["peak_bytes"]))


def peak_memory() -> int:
    """Most bytes of memory that this process ever had resident."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    found = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def main(options: dict[str, Any]) -> None:
    """Answer, and say `first` with the first token, then the peak of memory as JSON."""
    from smolrun import Model, ReasoningEvent, TextEvent

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    with Model(options.pop("path"), **options) as model:
        sampling: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
        said = False
        if model.loaded.template is None:
            model.generate([1, 2, 3], max_tokens=1, **sampling)
        else:
            for event in model.stream(PROMPT, max_tokens=ANSWER_TOKENS, **sampling):
                if not said and isinstance(event, (TextEvent, ReasoningEvent)):
                    say("first")
                    said = True
        if not said:
            say("first")
    say(json.dumps({"peak_bytes": peak_memory()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
