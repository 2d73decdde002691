"""Process start to first token, beside a llama-cpp-python script that does the same.

    python benchmarks/start.py MODEL.gguf [MODEL.gguf ...] [--threads 2] [--rounds 7]

Each round starts one process of each side, in alternating order, and takes the seconds from
starting it to the first byte of its answer, greedy, to the same chat prompt. The first round is not
measured: after it the files lie in the page cache, and Python's modules are compiled. Prints the
median seconds of both sides, and the median, least and greatest ratio of a round; above 1, smolrun
is faster.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compare import Pairs, timed_alternately

PROMPT = "Why is the sky blue?"

_SMOLRUN = """
import sys
from smolrun import Model

with Model(sys.argv[1], threads=int(sys.argv[2])) as model:
    answer = model.chat(sys.argv[3], max_tokens=1, temperature=0)
    print(repr(answer.text), flush=True)
"""

_LLAMA_CPP = """
import sys
from llama_cpp import Llama

model = Llama(sys.argv[1], n_threads=int(sys.argv[2]), verbose=False)
answer = model.create_chat_completion(
    [{"role": "user", "content": sys.argv[3]}], max_tokens=1, temperature=0
)
print(repr(answer["choices"][0]["message"]["content"]), flush=True)
"""

Command = Callable[[Path, int], list[str]]


def _script(source: str, path: Path, threads: int) -> list[str]:
    return ["-c", source, str(path), str(threads), PROMPT]


def _verb(path: Path, threads: int) -> list[str]:
    options = ["-q", "--threads", str(threads), "--max-tokens", "1", "--temp", "0"]
    return ["-m", "smolrun.cli.main", "run", *options, str(path), PROMPT]


OURS: dict[str, Command] = {
    "a script": functools.partial(_script, _SMOLRUN),
    "smolrun run": _verb,
}
THEIRS: Command = functools.partial(_script, _LLAMA_CPP)


def seconds_to_first_byte(arguments: list[str]) -> float:
    """Start Python with these arguments; RuntimeError where it says nothing or fails."""
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode or not first:
        raise RuntimeError(f"{arguments[:2]} ended with {process.returncode}")
    return seconds


def row(label: str, pairs: Pairs) -> str:
    """One line of the table, of (our seconds, their seconds)."""
    quotients = sorted(other / mine for mine, other in pairs)
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return (
        f"| {label} | {mine:.3f} | {other:.3f} | {statistics.median(quotients):.2f} "
        f"| {quotients[0]:.2f} | {quotients[-1]:.2f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print("| start to first token | smolrun, s | llama.cpp, s | ratio, median | least | greatest |")
    print("|---|---|---|---|---|---|", flush=True)
    for path in options.models:
        for label, ours in OURS.items():
            mine, other = (
                functools.partial(seconds_to_first_byte, command(path, options.threads))
                for command in (ours, THEIRS)
            )
            pairs = timed_alternately(mine, other, options.rounds)
            print(row(f"{path.stem}, {label}", pairs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
