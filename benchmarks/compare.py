"""smolrun beside other programs: same file, threads and prompt, timed alternately in one run.

    python benchmarks/compare.py MODEL.gguf [MODEL.gguf ...] [--peers llama.cpp,openvino]
        [--prompt 512,8192] [--depth 0,4096] [--sequences 16,32] [--threads 2]

Each round times both sides once, in alternating order; the ratio is taken within a round, so what a
neighbour does to the machine touches both. Prints the median, least and greatest ratio; above 1,
smolrun is faster. The ceilings of the machine, measured in between, stand below. Markdown, to go
into benchmarks/results.md.

Peers are llama.cpp (llama-cpp-python), openvino (openvino-genai), transformers-f32 and
transformers-bf16 (dequantized weights, on torch; needs accelerate). What is not installed, or does
not take a file, is said once and left out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers import PEERS, Peer, Settings, SmolrunPeer
from smolrun.cli.bench import counts
from smolrun.engine.native import resolve_isa
from smolrun.measure.ceilings import NAMES, CeilingMeter, Ceilings

Pairs = Sequence[tuple[float, float]]
"""Our seconds and theirs, of each round."""

BATCH_DEPTH = 128  # tokens in the cache of each sequence of a batch, as in `smolrun bench`
BATCH_STEPS = 32
REST_SECONDS = 0.02  # until the threads of the other side have gone to sleep
HEADER = """\
| work | smolrun tokens/s | peer tokens/s | peer | ratio, median | least | greatest |
|---|---:|---:|---|---:|---:|---:|"""


@dataclass(frozen=True)
class Work:
    """Something that every side can be timed at."""

    label: str
    tokens: int  # in all
    run: Callable[[Peer], float]  # seconds


def works(options: argparse.Namespace) -> list[Work]:
    """What the command line asks for."""
    found = []
    for count in filter(None, options.prompt):
        run = functools.partial(_prefill, tokens=[(37 * i) % 4000 + 20 for i in range(count)])
        found.append(Work(f"prefill {count}", count, run))
    for depth in options.depth if options.decode else ():
        run = functools.partial(_decode, sequences=1, depth=depth, count=options.decode)
        found.append(Work(f"decode {options.decode} at {depth}", options.decode, run))
    steps = min(BATCH_STEPS, options.decode or BATCH_STEPS)
    for count in filter(None, options.sequences):
        run = functools.partial(_decode, sequences=count, depth=BATCH_DEPTH, count=steps)
        label = f"{count} sequences: decode {steps} at {BATCH_DEPTH}"
        found.append(Work(label, count * steps, run))
    return found


def settings_for(options: argparse.Namespace) -> Settings:
    """What holds all of `works`, and no more: a prompt may be as long as the model's context."""
    several = max(options.sequences) > 0
    return Settings(
        threads=options.threads,
        context_size=max(1, *options.prompt, max(options.depth) + options.decode),
        sequences=max(1, *options.sequences),
        shared_size=BATCH_DEPTH + BATCH_STEPS if several else 0,
        activations=options.activations,
    )


def _prefill(peer: Peer, tokens: Sequence[int]) -> float:
    return peer.prefill(tokens)


def _decode(peer: Peer, sequences: int, depth: int, count: int) -> float:
    return peer.decode(sequences, depth, count)


def timed_alternately(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> list[tuple[float, float]]:
    """`Pairs` of so many rounds, after one that does not count."""
    pairs = []
    for turn in range(rounds + 1):
        if turn % 2:
            mine, other = _rested(ours), _rested(theirs)
        else:
            other, mine = _rested(theirs), _rested(ours)
        pairs.append((mine, other))
    return pairs[1:]


def _rested(run: Callable[[], float]) -> float:
    time.sleep(REST_SECONDS)
    return run()


def row(model: str, work: Work, pairs: Pairs, peer: str) -> str:
    """A line of the table."""
    ratios = [theirs / ours for ours, theirs in pairs]
    ours, theirs = (work.tokens / statistics.median(side) for side in zip(*pairs, strict=True))
    return (
        f"| {model} {work.label} | {ours:.1f} | {theirs:.1f} | {peer} "
        f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
    )


def opened(
    peers: Mapping[str, Callable[[Path, Settings], Peer]],
    path: Path,
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[Peer]:
    """The peers that take the file, one after the other: two models are in memory at most."""
    for name, load in peers.items():
        try:
            peer = load(path, settings)
        except ImportError as error:
            say(f"{name} is left out: not installed ({error})")
            continue
        except Exception as error:  # theirs, of whatever kind
            first = str(error).strip().splitlines()[:1]
            say(f"{name} is left out for {path.name}: {type(error).__name__} {' '.join(first)}")
            continue
        try:
            yield peer
        finally:
            peer.close()


def ceilings_text(ceilings: Ceilings) -> str:
    """One sentence."""
    parts = []
    for name, rates in ceilings.rates.items():
        unit = "GB/s" if name == "read" else "GOP/s"
        parts.append(f"{rates.high / 1e9:.0f} {unit} {NAMES[name]}")
    return f"Ceilings in this run ({ceilings.isa}, {ceilings.threads} threads): {', '.join(parts)}."


def compare(
    path: Path, options: argparse.Namespace, meter: CeilingMeter, say: Callable[[str], None]
) -> Iterator[str]:
    """The rows of one model; `say` is told what is left out."""
    asked, settings = works(options), settings_for(options)
    peers = {name: PEERS[name] for name in options.peers}
    ours = SmolrunPeer(path, settings)
    try:
        for peer in opened(peers, path, settings, say):
            for work in asked:
                meter.measure(samples=20)
                try:
                    pairs = timed_alternately(
                        functools.partial(work.run, ours),
                        functools.partial(work.run, peer),
                        options.rounds,
                    )
                except RuntimeError as error:
                    say(f"{path.name}, {work.label}: {peer.name} is left out ({error})")
                    continue
                yield row(path.stem, work, pairs, peer.name)
    finally:
        ours.close()


def peer_names(text: str) -> tuple[str, ...]:
    """`llama.cpp,openvino`: names of peers."""
    names = tuple(text.split(","))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name}: expected some of {', '.join(PEERS)}")
    return names


def arguments() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--peers", type=peer_names, default=tuple(PEERS), metavar="NAME,NAME")
    parser.add_argument("--activations", choices=("fast", "exact"), default="fast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--prompt", type=counts, default=(512,), metavar="N,N", help="tokens of prompts; 0: none"
    )
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded; 0: none")
    parser.add_argument(
        "--depth", type=counts, default=(0,), metavar="N,N", help="tokens in the cache before that"
    )
    parser.add_argument(
        "--sequences", type=counts, default=(0,), metavar="N,N", help="that decode side by side"
    )
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def main() -> int:
    options = arguments().parse_args()
    meter = CeilingMeter(resolve_isa(), options.threads)
    notes: dict[str, None] = {}  # each once
    print(HEADER, flush=True)
    for path in options.models:
        for line in compare(path, options, meter, lambda note: notes.setdefault(note)):
            print(line, flush=True)
    print()
    for note in notes:
        print(f"- {note}")
    print(f"- {ceilings_text(meter.ceilings)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
