"""Logits of tokens given by the caller, with a KV cache of the caller's own.

`forward` takes its blocks from the engine's pool and its steps between the steps of requests, so
both can go on side by side.
"""

from __future__ import annotations

import operator
import threading
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from smolrun.engine.kv import BlockTable, blocks_for
from smolrun.engine.sampling import check_finite
from smolrun.engine.scheduler import table_array
from smolrun.errors import ContextLengthError, RequestError, ResourceError

if TYPE_CHECKING:
    from smolrun.engine.engine import Engine


class Forward:
    """A batch of sequences that the caller feeds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tables: list[BlockTable] = []
        self._length = 0  # tokens of each sequence that are in the cache
        self._lock = threading.Lock()  # one caller at a time

    def forward(
        self, input_ids: npt.ArrayLike, start_pos: int = 0, all_positions: bool = False
    ) -> npt.NDArray[np.float32]:
        """See `Model.forward`."""
        tokens = self.checked_ids(input_ids)
        batch, count = tokens.shape
        try:
            start_pos = operator.index(start_pos)
        except TypeError:
            raise RequestError(
                f"start_pos: expected a whole number, got {start_pos!r:.80}"
            ) from None
        with self._lock:
            self._check_start(start_pos, batch)
            if start_pos + count > self._engine.context_size:
                raise ContextLengthError(start_pos + count, self._engine.context_size)
            try:
                logits = self._run(tokens, start_pos, all_positions)
            except BaseException:  # Ctrl-C too: nobody knows what is in the cache
                self._engine.call(self._release)
                raise
            self._length = start_pos + count
        return logits

    def clear(self) -> None:
        """Give the cache back."""
        with self._lock:
            self._engine.call(self._release)

    def checked_ids(self, input_ids: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """Token ids (batch, n). RequestError where they are something else."""
        try:
            ids = np.asarray(input_ids)
        except (ValueError, OverflowError) as error:  # rows of different lengths, for one
            raise RequestError(f"input_ids: no array of token ids: {error}") from None
        if ids.ndim == 1:
            ids = ids[np.newaxis]
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise RequestError(
                "input_ids: expected integers of shape (batch, n) or (n,), "
                f"got {ids.dtype} of shape {ids.shape}"
            )
        for wrong in (int(ids.min()), int(ids.max())):
            if not 0 <= wrong < self._engine.vocab_size:
                raise RequestError(
                    f"input_ids: token {wrong} is not in the vocabulary of "
                    f"{self._engine.vocab_size}"
                )
        return np.ascontiguousarray(ids, np.int32)

    def _check_start(self, start_pos: int, batch: int) -> None:
        if not 0 <= start_pos <= self._length:
            raise RequestError(
                f"start_pos: expected 0 to {self._length}, the number of tokens already passed "
                f"to forward(), got {start_pos}"
            )
        if start_pos and batch != len(self._tables):
            raise RequestError(
                f"input_ids: the cache holds {len(self._tables)} sequences, got {batch}; start "
                "again from start_pos 0"
            )

    def _run(
        self, tokens: npt.NDArray[np.int32], start_pos: int, all_positions: bool
    ) -> npt.NDArray[np.float32]:
        batch, count = tokens.shape
        # Sequence after sequence: the logits of a step are then neighbours in the result.
        tokens = tokens.reshape(-1)
        places = np.arange(batch * count, dtype=np.int32)
        sequences, offsets = places // count, places % count
        positions = start_pos + offsets
        wanted = places if all_positions else places[offsets == count - 1]
        logits = np.empty((len(wanted), self._engine.vocab_size), np.float32)

        def step(begin: int, end: int) -> None:
            if begin == 0:  # not a call of its own: a token is short beside two switches of threads
                self._prepare(batch, start_pos, start_pos + count)
            low, high = np.searchsorted(wanted, (begin, end))
            first, last = sequences[begin], sequences[end - 1] + 1
            self._engine.runner.step(
                tokens[begin:end],
                positions[begin:end],
                sequences[begin:end] - first,
                table_array(self._tables[first:last]),
                wanted[low:high] - np.int32(begin),
                logits[low:high],
            )
            check_finite(logits[low:high])

        for begin in range(0, batch * count, self._engine.max_step_tokens):
            end = min(begin + self._engine.max_step_tokens, batch * count)
            self._engine.call(partial(step, begin, end))
        return logits.reshape(batch, -1, self._engine.vocab_size)

    def _prepare(self, batch: int, start_pos: int, end: int) -> None:
        """Have blocks for `end` tokens of each sequence, of which `start_pos` are kept."""
        pool = self._engine.pool
        if start_pos == 0:
            self._release()
            self._tables = [BlockTable() for _ in range(batch)]
        for table in self._tables:
            pool.truncate(table, start_pos)
            if not pool.promise(table, end):
                raise ResourceError(
                    f"forward() of {batch} sequences to {end} tokens needs "
                    f"{batch * blocks_for(end)} KV blocks; {pool.available} of {pool.num_blocks} "
                    "are to be had"
                )
            pool.grow(table, end)

    def _release(self) -> None:
        for table in self._tables:
            self._engine.pool.release(table)
        self._tables = []
        self._length = 0
