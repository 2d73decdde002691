"""A runner whose logits depend on every token of the sequence, read through its block table."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun.engine.engine import Engine
from smolrun.engine.kv import BLOCK_TOKENS
from smolrun.engine.runner import Float32Array, Int32Array
from smolrun.engine.sampling import SampledToken, SamplingParameters, sampling_parameters
from smolrun.engine.sequence import Ending
from tests.waiting import SECONDS

VOCABULARY = 512
HIDDEN_SIZE = 8
DEFAULTS = SamplingParameters()


class Gate:
    """Makes steps wait, so that a test decides what happens between two of them."""

    def __init__(self) -> None:
        self._passes: threading.Semaphore | None = None
        self.waits = False
        """A step is at the gate, or past it already where the gate was opened since."""

    def hold(self, steps: int = 0) -> None:
        """Let `steps` more steps pass, then make them wait."""
        self.waits = False
        self._passes = threading.Semaphore(steps)

    def go_on(self) -> None:
        """Let the step that waits, and all later ones, pass."""
        passes, self._passes = self._passes, None
        if passes is not None:
            passes.release()

    def wait(self) -> None:
        passes = self._passes  # which go_on() may take away meanwhile
        if passes is not None and not passes.acquire(blocking=False):
            self.waits = True
            assert passes.acquire(timeout=SECONDS), "the test never let the step go on"


class GatedRunner(Gate):
    """A real runner behind a gate."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, *arrays: Any) -> None:
        self.wait()
        self._runner.step(*arrays)


class FakeRunner(Gate):
    """Stores token ids as "keys"; fails on a slot that was never written or was wiped."""

    kv_block_bytes = BLOCK_TOKENS * 4

    def __init__(self, kv_blocks: int, vocab_size: int = VOCABULARY) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.pool = np.full((kv_blocks, BLOCK_TOKENS), -1, np.int64)
        self.steps: list[tuple[int, int]] = []  # tokens and sequences of each step
        self.zeroed: list[int] = []
        self.before: Callable[[Int32Array, Int32Array], None] = lambda tokens, positions: None
        self.poison: set[int] = set()  # tokens that make every later logit NaN

    @property
    def memory(self) -> dict[str, Any]:
        return {}

    def zero_blocks(self, blocks: Int32Array, /) -> None:
        self.zeroed += blocks.tolist()
        self.pool[blocks] = -1

    def step(
        self,
        tokens: Int32Array,
        positions: Int32Array,
        sequences: Int32Array,
        block_tables: Int32Array,
        logit_rows: Int32Array,
        logits: Float32Array | None,
        hidden: Float32Array | None = None,
    ) -> None:
        self.wait()
        self.before(tokens, positions)
        assert logits is None or logits.shape == (len(logit_rows), self.vocab_size)
        for array in (tokens, positions, sequences, block_tables, logit_rows):
            assert array.dtype == np.int32
        self.steps.append((len(tokens), len(block_tables)))
        blocks = block_tables[sequences, positions // BLOCK_TOKENS]
        self.pool[blocks, positions % BLOCK_TOKENS] = tokens
        for number, row in enumerate(logit_rows):
            seen = self.seen(block_tables[sequences[row]], int(positions[row]) + 1)
            found = self.logits_of(seen)
            if logits is not None:
                logits[number] = found
            if hidden is not None:
                hidden[number] = found[:HIDDEN_SIZE]

    def seen(self, table: Int32Array, length: int) -> npt.NDArray[np.int64]:
        seen = self.pool[table].reshape(-1)[:length]
        assert (seen >= 0).all(), "read a slot that was never written"
        return seen

    def logits_of(self, tokens: npt.NDArray[np.int64]) -> Float32Array:
        if self.poison.intersection(tokens.tolist()):
            return np.full(self.vocab_size, np.nan, np.float32)
        generator = np.random.default_rng(zlib.crc32(tokens.tobytes()))
        return 3 * generator.standard_normal(self.vocab_size, np.float32)


class TokenOutput:
    """Hands the tokens out as they are."""

    def __init__(self) -> None:
        self.on_push: Callable[[SampledToken], None] = lambda token: None
        self.stop_at: int | None = None

    def progress(self, done: int, total: int) -> Iterable[Any]:
        return [("progress", done, total)]

    def push(self, token: SampledToken) -> tuple[Iterable[Any], bool]:
        self.on_push(token)
        return [token], token.id == self.stop_at

    def finish(self, ending: Ending) -> Iterable[Any]:
        return [ending]


def fake_engine(kv_blocks: int = 64, context_size: int = 256, **options: Any) -> Engine:
    return Engine(
        FakeRunner(kv_blocks),
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        context_size=context_size,
        kv_blocks=kv_blocks,
        **options,
    )


def fake_of(engine: Engine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


def parameters(**arguments: Any) -> SamplingParameters:
    return sampling_parameters(arguments, DEFAULTS, VOCABULARY)


def collect(events: Iterable[Any]) -> tuple[list[SampledToken], Ending]:
    """All tokens of a request and how it ended."""
    *others, ending = events
    assert isinstance(ending, Ending)
    return [event for event in others if isinstance(event, SampledToken)], ending


def solo(prompt: list[int], arguments: dict[str, Any], **options: Any) -> list[SampledToken]:
    """What a request gives on a fresh engine of its own."""
    engine = fake_engine(**options)
    try:
        return collect(engine.submit(prompt, parameters(**arguments), TokenOutput()))[0]
    finally:
        engine.close()


def prompts(count: int, seed: int = 0, longest: int = 120) -> list[list[int]]:
    """Prompts of up to `longest` tokens."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, VOCABULARY, generator.integers(1, longest)).tolist()
        for _ in range(count)
    ]


def healthy(engine: Engine) -> None:
    """Nothing runs, nothing is held, and a request still gives what it gives elsewhere."""
    statistics = engine.statistics()
    assert (statistics["running"], statistics["waiting"], statistics["kv_blocks_held"]) == (0, 0, 0)
    tokens, _ = collect(engine.submit([1, 2, 3], parameters(max_tokens=4), TokenOutput()))
    assert tokens == solo([1, 2, 3], {"max_tokens": 4})
