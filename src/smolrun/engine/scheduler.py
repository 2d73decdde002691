"""Which tokens go into the next step.

First come, first served. Sequences that are generating come first, one token each, so that a
long prompt never holds up an answer by more than one step; prompts share what room is left.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from smolrun.engine.kv import BlockPool, BlockTable
from smolrun.engine.runner import Int32Array
from smolrun.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Some tokens of one sequence, computed in one step."""

    sequence: Sequence
    start: int  # position of the first
    count: int

    @property
    def wants_logits(self) -> bool:
        """Whether the sequence's last token is among them."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Holds the waiting and the running sequences; used by the loop only.

    Args:
        pool: where KV blocks come from.
        max_step_tokens: tokens of one step, at most.
        max_sequences: sequences that run at a time, at most.
    """

    def __init__(self, pool: BlockPool, max_step_tokens: int, max_sequences: int) -> None:
        self._pool = pool
        self._max_step_tokens = max_step_tokens
        self._max_sequences = min(max_sequences, max_step_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def all(self) -> list[Sequence]:
        """Every sequence, those that run first."""
        return [*self.running, *self.waiting]

    def admit(self) -> None:
        """Let in waiting sequences, in order, while there are places and blocks."""
        while self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            table = self._pool.admit(sequence.tokens, sequence.kv_tokens, sequence.salt)
            if table is None:
                return
            self.waiting.popleft()
            sequence.table = table
            sequence.computed = sequence.cached_tokens = table.cached_tokens
            sequence.admitted = time.perf_counter()
            self.running.append(sequence)

    def plan(self) -> list[Chunk]:
        """The next step: every generating sequence, then prompts in order of arrival."""
        room = self._max_step_tokens
        chunks: list[Chunk] = []
        for generating in (True, False):
            for sequence in self.running:
                if sequence.generating == generating and room > 0:
                    count = min(sequence.remaining, room)
                    chunks.append(Chunk(sequence, sequence.computed, count))
                    room -= count
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)


@dataclass(frozen=True)
class Step:
    """The arrays of one step, as the runner takes them."""

    tokens: Int32Array  # (n,)
    positions: Int32Array  # (n,)
    sequences: Int32Array  # (n,)
    block_tables: Int32Array  # (s, longest table)
    logit_rows: Int32Array  # (r,)


def step_arrays(chunks: list[Chunk]) -> Step:
    """The arrays for `chunks`; rows with logits are in the order of the chunks."""
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[int] = []
    logit_rows: list[int] = []
    tables: list[BlockTable] = []
    for number, chunk in enumerate(chunks):
        stop = chunk.start + chunk.count
        tokens += chunk.sequence.tokens[chunk.start : stop]
        positions += range(chunk.start, stop)
        sequences += [number] * chunk.count
        if chunk.wants_logits:
            logit_rows.append(len(tokens) - 1)
        assert chunk.sequence.table is not None
        tables.append(chunk.sequence.table)
    return Step(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        sequences=np.array(sequences, np.int32),
        block_tables=table_array(tables),
        logit_rows=np.array(logit_rows, np.int32),
    )


def table_array(tables: list[BlockTable]) -> Int32Array:
    """Block tables as one array (s, longest); block 0 fills the rest and is never read there."""
    array = np.zeros((len(tables), max(len(table.blocks) for table in tables)), np.int32)
    for row, table in zip(array, tables, strict=True):
        row[: len(table.blocks)] = table.blocks
    return array
