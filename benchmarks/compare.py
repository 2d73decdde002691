"""smolrun beside another program: same file, threads and prompt, timed alternately in one run.

    python benchmarks/compare.py MODEL.gguf [MODEL.gguf ...] [--peer llama.cpp] [--threads 2]

Each round times both sides once, in alternating order; the ratio is taken within a round, so what a
neighbour does to the machine touches both. Prints the median, least and greatest ratio; above 1,
smolrun is faster. Markdown, to be appended to benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from peers import PEERS, Peer, SmolrunPeer


def ratios(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> list[tuple[float, float]]:
    """(our seconds, their seconds) of each round, after one unmeasured round."""
    ours()
    theirs()
    pairs = []
    for turn in range(rounds):
        if turn % 2 == 0:
            mine, other = ours(), theirs()
        else:
            other, mine = theirs(), ours()
        pairs.append((mine, other))
    return pairs


def row(label: str, work: int, pairs: list[tuple[float, float]], peer: str) -> str:
    quotients = sorted(other / mine for mine, other in pairs)
    mine = work / statistics.median(pair[0] for pair in pairs)
    other = work / statistics.median(pair[1] for pair in pairs)
    return (
        f"| {label} | {mine:.1f} | {other:.1f} ({peer}) | {statistics.median(quotients):.2f} "
        f"| {quotients[0]:.2f} | {quotients[-1]:.2f} |"
    )


def compare(path: Path, options: argparse.Namespace, context: int) -> None:
    """The rows of one model."""
    ours: Peer = SmolrunPeer(path, options.threads, context, options.activations)
    theirs: Peer = PEERS[options.peer](path, options.threads, context)
    prompt = [(37 * i) % 4000 + 20 for i in range(options.prompt)]
    work: list[tuple[str, int, Callable[[Peer], float]]] = []
    if options.prompt:
        work.append(
            (f"prefill {options.prompt}", options.prompt, lambda peer: peer.prefill(prompt))
        )
    for depth in options.depth if options.decode else []:
        run: Callable[[Peer], float] = functools.partial(_decode, depth=depth, count=options.decode)
        work.append((f"decode at {depth}", options.decode, run))
    for label, tokens, run in work:
        pairs = ratios(functools.partial(run, ours), functools.partial(run, theirs), options.rounds)
        print(row(f"{path.stem} {label}", tokens, pairs, theirs.name), flush=True)
    ours.close()
    theirs.close()


def _decode(peer: Peer, depth: int, count: int) -> float:
    return peer.decode(depth, count)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument(
        "--peer", choices=[name for name in PEERS if name != "smolrun"], default="llama.cpp"
    )
    parser.add_argument("--activations", choices=("exact", "fast"), default="exact")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded")
    parser.add_argument("--depth", type=int, nargs="*", default=[0], help="depths to decode at")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    context = max(options.prompt, max(options.depth, default=0) + options.decode) + 64
    print("| work | smolrun tokens/s | peer tokens/s | ratio, median | least | greatest |")
    print("|---|---|---|---|---|---|", flush=True)
    for path in options.models:
        compare(path, options, context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
