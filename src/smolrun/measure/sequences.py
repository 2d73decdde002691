"""Sequences with KV blocks of their own, stepped directly: what a model costs without its callers.

Everything runs on the engine's thread, between the steps of requests, so nothing is handed from
thread to thread inside a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from smolrun.engine.kv import BlockTable
from smolrun.engine.scheduler import table_array
from smolrun.errors import ResourceError
from smolrun.measure.work import chunks

if TYPE_CHECKING:
    from smolrun.engine.engine import Engine

Tokens = npt.NDArray[np.int32]
Observer = Callable[[int, int, int, int, bool], None]
"""Called after a step: when it began (nanoseconds), tokens of each sequence, start, sequences,
whether logits were computed."""


class Sequences:
    """`count` sequences with room for `length` tokens each.

    ResourceError where the KV cache does not hold them. Close it, or leave its `with` block.
    """

    def __init__(self, engine: Engine, count: int, length: int) -> None:
        self.engine = engine
        self.count = count
        self.length = length
        self.observer: Observer | None = None
        self._tables = [BlockTable() for _ in range(count)]
        self._logits = np.empty((count, engine.vocab_size), np.float32)
        engine.call(self._take_blocks)
        self._table_array = table_array(self._tables)

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the blocks back."""
        self.engine.call(self._release)

    def prefill(self, tokens: Tokens) -> float:
        """Seconds to take in tokens (n,) of the first sequence, up to the logits of the last."""
        return self.engine.call(lambda: self._prefill(tokens))

    def decode(self, first: Tokens, start: int, count: int) -> tuple[float, Tokens]:
        """Seconds for `count` steps, and the tokens (sequences, count) that they chose.

        `first` (sequences,) goes in at position `start`; the likeliest token is the next.
        """
        return self.engine.call(lambda: self._decode(first, start, count))

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits (sequences, vocab_size) of the last step; written over by the next."""
        return self._logits

    # --- on the engine's thread

    def _take_blocks(self) -> None:
        pool = self.engine.pool
        try:
            for table in self._tables:
                if not pool.promise(table, self.length):
                    raise ResourceError(
                        f"the KV cache has no room for {self.count} sequences of {self.length} "
                        "tokens"
                    )
                pool.grow(table, self.length)
        except BaseException:
            self._release()
            raise
        # Takes the memory now. What stands in the cache changes nothing about the time: so zeros
        # stand for a context of any length.
        blocks = [block for table in self._tables for block in table.blocks]
        self.engine.runner.zero_blocks(np.array(blocks, np.int32))

    def _release(self) -> None:
        for table in self._tables:
            self.engine.pool.release(table)

    def _prefill(self, tokens: Tokens) -> float:
        begin = time.perf_counter()
        for part in chunks(len(tokens), 0, self.engine.max_step_tokens):
            end = part.start + part.tokens
            self._step(tokens[None, part.start : end], part.start, 1, part.logits)
        return time.perf_counter() - begin

    def _decode(self, first: Tokens, start: int, count: int) -> tuple[float, Tokens]:
        chosen = np.empty((self.count, count), np.int32)
        tokens = first
        begin = time.perf_counter()
        for i in range(count):
            self._step(tokens[:, None], start + i, self.count, True)
            tokens = self._logits.argmax(axis=1).astype(np.int32)
            chosen[:, i] = tokens
        return time.perf_counter() - begin, chosen

    def _step(self, tokens: Tokens, start: int, sequences: int, logits: bool) -> None:
        """Tokens (sequences, n) from position `start` on."""
        n = tokens.shape[1]
        rows = np.arange(n - 1, sequences * n, n) if logits else np.arange(0)
        begin = time.perf_counter_ns()
        self.engine.runner.step(
            np.ascontiguousarray(tokens).reshape(-1),
            np.tile(np.arange(start, start + n, dtype=np.int32), sequences),
            np.repeat(np.arange(sequences, dtype=np.int32), n),
            self._table_array[:sequences],
            rows.astype(np.int32),
            self._logits[: len(rows)],
        )
        if self.observer is not None:
            self.observer(begin, n, start, sequences, logits)
