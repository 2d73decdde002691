"""What benchmarks/compare.py makes of times, with programs that take as long as they are told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import compare
import peers
from peers import Peer, Settings, SmolrunPeer
from tests.api.tiny import make_folder
from tests.measure.support import FixedMeter, ceilings

PATH = Path("tiny.gguf")
SETTINGS = Settings(threads=1, context_size=100)


class FakePeer:
    """Takes a second for a token, in every sequence; remembers what it was asked."""

    def __init__(self, name: str, seconds: float = 1.0) -> None:
        self.name = name
        self.seconds = seconds
        self.asked: list[tuple[int, ...]] = []
        self.open = True

    def prefill(self, tokens: Sequence[int]) -> float:
        self.asked.append((len(tokens),))
        return len(tokens) * self.seconds

    def decode(self, sequences: int, depth: int, count: int) -> float:
        self.asked.append((sequences, depth, count))
        return sequences * count * self.seconds

    def close(self) -> None:
        self.open = False


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "REST_SECONDS", 0)


def options(*words: str) -> argparse.Namespace:
    return compare.arguments().parse_args(["tiny.gguf", *words])


def side(log: list[str], name: str, seconds: Iterator[float]) -> Callable[[], float]:
    def run() -> float:
        log.append(name)
        return next(seconds)

    return run


def test_sides_take_turns_at_being_first() -> None:
    log: list[str] = []
    ours, theirs = iter([9.0, 1.0, 2.0, 3.0]), iter([99.0, 10.0, 20.0, 30.0])
    pairs = compare.timed_alternately(side(log, "a", ours), side(log, "b", theirs), rounds=3)
    assert pairs == [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)], "without the first round"
    assert "".join(log) == "baabbaab"


def test_a_ratio_is_of_one_round() -> None:
    work = compare.Work("prefill 10", 10, lambda peer: 0.0)
    line = compare.row("tiny", work, [(1.0, 2.0), (2.0, 2.0), (4.0, 20.0)], "other")
    assert line == "| tiny prefill 10 | 5.0 | 5.0 | other | 2.00 | 1.00 | 5.00 |"


def test_what_is_asked_for_is_what_is_run() -> None:
    found = compare.works(options("--prompt", "0,7", "--depth", "0,90", "--sequences", "4,16"))
    assert [(work.label, work.tokens) for work in found] == [
        ("prefill 7", 7),
        ("decode 64 at 0", 64),
        ("decode 64 at 90", 64),
        ("4 sequences: decode 32 at 128", 128),
        ("16 sequences: decode 32 at 128", 512),
    ]
    peer = FakePeer("fake")
    assert [work.run(peer) for work in found] == [7, 64, 64, 128, 512]
    assert peer.asked == [(7,), (1, 0, 64), (1, 90, 64), (4, 128, 32), (16, 128, 32)]
    assert compare.works(options("--prompt", "0", "--decode", "0")) == []


def test_a_prompt_may_fill_the_context() -> None:
    found = compare.settings_for(options("--prompt", "512,8192", "--depth", "0,4096"))
    assert (found.context_size, found.sequences, found.most_tokens) == (8192, 1, 8192)
    found = compare.settings_for(options("--depth", "0,4096", "--sequences", "16,64"))
    assert (found.context_size, found.sequences, found.most_tokens) == (4160, 64, 64 * 160)


def test_a_peer_that_is_not_there_is_said_and_left_out() -> None:
    found = {name: FakePeer(name) for name in ("first", "last")}

    def load(peer: FakePeer) -> Callable[[Path, Settings], Peer]:
        return lambda path, settings: peer

    def missing(path: Path, settings: Settings) -> Peer:
        raise ImportError("No module named 'missing'")

    def refusing(path: Path, settings: Settings) -> Peer:
        raise ValueError("unsupported type 12\nand a long trace")

    said: list[str] = []
    loaders = {
        "first": load(found["first"]), "missing": missing, "refusing": refusing,
        "last": load(found["last"]),
    }  # fmt: skip
    seen = []
    for peer in compare.opened(loaders, PATH, SETTINGS, said.append):
        seen.append((peer.name, [name for name, each in found.items() if each.open]))
    assert seen == [("first", ["first", "last"]), ("last", ["last"])], "one closed before the next"
    assert not found["last"].open
    assert said == [
        "missing is left out: not installed (No module named 'missing')",
        "refusing is left out for tiny.gguf: ValueError unsupported type 12",
    ]


def test_a_table_of_a_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "tiny")
    other = FakePeer("slow", seconds=1000.0)
    monkeypatch.setattr(compare, "PEERS", {"slow": lambda path, settings: other})
    asked = options(
        "--prompt", "10", "--decode", "3", "--depth", "0,20", "--sequences", "3", "--rounds", "2"
    )
    asked.peers = ("slow",)
    meter = FixedMeter()
    lines = list(compare.compare(folder, asked, meter, lambda note: pytest.fail(note)))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in cells] == [
        "tiny prefill 10", "tiny decode 3 at 0", "tiny decode 3 at 20",
        "tiny 3 sequences: decode 3 at 128",
    ]  # fmt: skip
    for row in cells:
        assert row[2:4] == ["0.0", "slow"]
        assert float(row[4]) > 1
    assert meter.calls == 4, "beside every row"
    assert not other.open


def test_smolrun_decodes_the_same_with_a_cache_filled_before(tmp_path: Path) -> None:
    settings = Settings(threads=1, context_size=64, sequences=2, shared_size=64)
    peer = SmolrunPeer(make_folder(tmp_path / "tiny"), settings)
    try:
        for sequences, depth in ((1, 0), (1, 20), (1, 20), (2, 20), (2, 0), (1, 9)):
            assert peer.decode(sequences, depth, 3) > 0
        assert peer.prefill(range(30)) > 0
        assert peer.decode(1, 9, 3) > 0
    finally:
        peer.close()


def test_names_of_peers_are_checked() -> None:
    assert compare.peer_names("llama.cpp,openvino") == ("llama.cpp", "openvino")
    assert options().peers == tuple(peers.PEERS)
    with pytest.raises(argparse.ArgumentTypeError, match=r"ollama: expected some of llama\.cpp"):
        compare.peer_names("ollama")


def test_ceilings_stand_beside() -> None:
    text = compare.ceilings_text(ceilings("bf16"))
    assert text == (
        "Ceilings in this run (scalar, 2 threads): 10 GB/s streaming read, 100 GOP/s float32 "
        "multiply-add, 200 GOP/s int16 dot product, 400 GOP/s int8 dot product."
    )
