"""Which tokens go into the next step.

Sequences that are generating come first, one token each; prompts share what room is left, which is
less while somebody generates, so that a long prompt holds up an answer by one small chunk at most.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from smolrun.engine.kv import BlockPool, BlockTable
from smolrun.engine.likelihood import MOST_ROWS
from smolrun.engine.reading import Scoring
from smolrun.engine.runner import Int32Array
from smolrun.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Some tokens of one sequence, computed in one step."""

    sequence: Sequence
    start: int  # position of the first
    count: int

    @property
    def rows(self) -> range:
        """Which of them, counted from the first, are those whose logits are wanted."""
        return range(max(self.sequence.first_row - self.start, 0), self.count)


class Scheduler:
    """Holds the waiting and the running sequences; used by the loop only.

    Callers, told apart by the key of their requests, take turns: who has been served least comes
    first, in what is let in and in whose prompt is read. Service is counted in tokens, one for each
    token of a prompt that is computed and two for each one generated; who comes back after a pause
    starts level with the others (the virtual token counter of arXiv 2401.00588).

    Args:
        pool: where KV blocks come from.
        max_step_tokens: tokens of one step, at most.
        max_sequences: sequences that run at a time, at most.
        shared_chunk: prompt tokens of one step, at most, while others are generating; for each
            of these two more.
    """

    def __init__(
        self, pool: BlockPool, max_step_tokens: int, max_sequences: int, shared_chunk: int
    ) -> None:
        self._pool = pool
        self._max_step_tokens = max_step_tokens
        self._max_sequences = min(max_sequences, max_step_tokens)
        self._shared_chunk = shared_chunk
        self._waiting: dict[str, deque[Sequence]] = {}  # by key; none is empty
        self._served: dict[str, int] = {}
        self.running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        """How many sequences wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self.running)

    def all(self) -> list[Sequence]:
        """Every sequence, those that run first."""
        return [*self.running, *(each for queue in self._waiting.values() for each in queue)]

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        active = {*self._waiting, *(running.key for running in self.running)}
        if sequence.key not in active:
            least = min((self._served[key] for key in active), default=0)
            if not active:  # nobody is owed anything any more
                self._served.clear()
            self._served[sequence.key] = max(self._served.get(sequence.key, 0), least)
        self._waiting.setdefault(sequence.key, deque()).append(sequence)

    def first(self) -> Sequence:
        """The waiting sequence whose turn it is; there must be one."""
        owed = {key: self._served[key] for key in self._waiting}
        for sequence in self.running:  # what was let in and is not computed yet counts here
            if sequence.key in owed:
                owed[sequence.key] += sequence.remaining
        return self._waiting[min(owed, key=owed.__getitem__)][0]

    def admit(self) -> None:
        """Let in waiting sequences, by turns, while there are places and blocks."""
        while self._waiting and len(self.running) < self._max_sequences:
            sequence = self.first()
            # A token whose logits are wanted has to be computed, whatever the cache knows.
            known = sequence.tokens[: sequence.first_row + 1]
            table = self._pool.admit(known, sequence.kv_tokens, sequence.salt)
            if table is None:
                return
            self.remove(sequence)
            sequence.table = table
            sequence.computed = sequence.cached_tokens = table.cached_tokens
            sequence.admit()
            self.running.append(sequence)

    def plan(self) -> list[Chunk]:
        """The next step: every generating sequence, then prompts by turns."""
        chunks = [Chunk(each, each.computed, 1) for each in self.running if each.generating]
        room = self._max_step_tokens - len(chunks)
        for chunk in chunks:
            self._served[chunk.sequence.key] += 2
        if chunks:
            room = min(room, self._shared_chunk + 2 * len(chunks))
        rows = MOST_ROWS
        prompts = [each for each in self.running if not each.generating]
        while prompts and room > 0:
            sequence = min(prompts, key=lambda each: self._served[each.key])
            prompts.remove(sequence)
            count = min(sequence.remaining, room)
            if isinstance(sequence, Scoring):
                before = max(sequence.first_row - sequence.computed, 0)
                count = min(count, before + rows)
                rows -= max(count - before, 0)
            if count:
                chunks.append(Chunk(sequence, sequence.computed, count))
            self._served[sequence.key] += count
            room -= count
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, or waits no longer."""
        if sequence in self.running:
            self.running.remove(sequence)
            return
        queue = self._waiting.get(sequence.key, ())
        if sequence in queue:
            assert isinstance(queue, deque)
            queue.remove(sequence)
            if not queue:
                del self._waiting[sequence.key]


@dataclass(frozen=True)
class Step:
    """The arrays of one step, as the runner takes them."""

    tokens: Int32Array  # (n,)
    positions: Int32Array  # (n,)
    sequences: Int32Array  # (n,)
    block_tables: Int32Array  # (s, longest table)
    logit_rows: Int32Array  # (r,) of every chunk one after the other


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
        logit_rows += [len(tokens) - chunk.count + row for row in chunk.rows]
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
