"""The loop: admit, choose tokens, run one step, sample, hand out.

One thread owns the runner, the KV blocks and every running sequence; everybody else talks to it
through its inbox. So callers on any number of threads are safe, and their requests share steps.
An idle loop sleeps.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Items
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from smolrun.engine.kv import BlockPool, blocks_for
from smolrun.engine.places import Places
from smolrun.engine.reading import Given, Likelihood, MeanHidden, Reading, Scoring
from smolrun.engine.runner import Runner
from smolrun.engine.sampling import Constraint, SamplingParameters
from smolrun.engine.scheduler import Chunk, Scheduler, step_arrays
from smolrun.engine.sequence import FinishReason, Output, Request, Sequence, Terms
from smolrun.errors import (
    ClosedError,
    ContextLengthError,
    NonFiniteError,
    RequestError,
    ResourceError,
    SmolrunError,
)

T = TypeVar("T")

# Such a step takes about three times as long as one without a prompt, whatever the model: a
# prompt token costs a tenth of a step of few rows. Smaller chunks lose hardly any speed
# (docs/decisions.md).
SHARED_CHUNK = 16
DEFAULT_TERMS = Terms()
# How long the loop waits with the next step when readers were handed something; what it comes to
# is the least that the system can sleep, some 50 microseconds.
HANDOVER_SECONDS = 1e-6


class Engine:
    """Runs requests over one runner.

    Args:
        runner: computes steps.
        vocab_size: width of a row of logits.
        hidden_size: width of a row of hidden states.
        context_size: most tokens of one request, prompt and answer.
        kv_blocks: blocks in the runner's pool; they hold at least one whole context.
        model: identity of the model, for the prefix cache.
        max_step_tokens: tokens of one step, at most.
        max_sequences: requests that share steps, at most; others wait their turn.
        shared_chunk: prompt tokens of one step, at most, while others are generating; for each
            of these two more.
        handover: let readers take what they were handed before the next step. For a runner that
            keeps every core busy: a reader's thread that came in between would take one of them,
            and the others would wait for that one.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        vocab_size: int,
        hidden_size: int,
        context_size: int,
        kv_blocks: int,
        model: bytes = b"",
        max_step_tokens: int = 256,
        max_sequences: int = 16,
        shared_chunk: int = SHARED_CHUNK,
        handover: bool = False,
    ) -> None:
        if blocks_for(context_size) > kv_blocks:
            raise ResourceError(
                f"a context of {context_size} tokens needs {blocks_for(context_size)} KV blocks, "
                f"there are {kv_blocks}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.context_size = context_size
        self.max_step_tokens = max_step_tokens
        self.runner = runner
        # A prefix cache of a quarter of the pool: memory grows with use, not up to the whole pool.
        self.pool = BlockPool(
            kv_blocks, model, max_cached=max(kv_blocks // 4, blocks_for(context_size))
        )
        self.max_sequences = max_sequences
        self.places = Places()
        self.handover = handover
        self._handed = False  # somebody was handed something since the last step
        self.on_step: Callable[[int], None] | None = None  # called with the tokens of each step
        self._scheduler = Scheduler(self.pool, max_step_tokens, max_sequences, shared_chunk)
        self._logits = np.empty((max_sequences, vocab_size), np.float32)
        self._counts = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_tokens", "completion_tokens"), 0
        )
        self._counts |= dict.fromkeys(("cancelled", "corrupted", "expired", "failed"), 0)
        self._counts |= dict.fromkeys(("steps", "step_tokens"), 0)
        self._inbox: list[tuple[Callable[[], None], Callable[[Exception], None]]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._process = os.getpid()
        self._thread: threading.Thread | None = None

    # --- called from any thread ---

    def submit(
        self,
        prompt: Items[int],
        parameters: SamplingParameters,
        output: Output,
        *,
        stop_ids: Collection[int] = (),
        terms: Terms = DEFAULT_TERMS,
        constraint: Constraint | None = None,
    ) -> Request:
        """Start a request.

        Args:
            prompt: token ids.
            parameters: how to sample.
            output: makes the events that the returned request yields.
            stop_ids: tokens that end the answer.
            terms: whose it is, and how long it may take.
            constraint: of the tokens that are drawn.

        Raises:
            RequestError: the prompt is empty or holds a token outside the vocabulary.
            ContextLengthError: the prompt leaves no room for a token.
            QueueFullError: too many requests, or prompt tokens, wait already.
            ClosedError: the model is closed, or draining.
        """
        tokens = self.checked(prompt)
        if len(tokens) >= self.context_size:
            raise ContextLengthError(len(tokens), self.context_size)
        return self._queued(
            Sequence(tokens, parameters, stop_ids, self.context_size, output, terms, constraint)
        )

    def read(self, tokens: Items[int], terms: Terms = DEFAULT_TERMS) -> Request:
        """Start a request for the mean of the hidden states of tokens.

        The one event is float32 (hidden_size,), of length 1. Errors are as of `submit`.
        """
        ids = self.checked(tokens)
        if len(ids) > self.context_size:
            raise ContextLengthError(len(ids), self.context_size)
        return self._queued(Reading(ids, MeanHidden(self.hidden_size), terms))

    def score(
        self,
        tokens: Items[int],
        first: int,
        terms: Terms = DEFAULT_TERMS,
        *,
        top_logprobs: int | None = None,
    ) -> Request:
        """Start a request for how likely tokens[first:] are, each after those before it.

        Args:
            tokens: at least two.
            first: the first that counts, at least 1.
            terms: whose it is, and how long it may take.
            top_logprobs: tell the tokens, with so many likeliest ones in the place of each.

        The one event is a `TokenLikelihoods`. Errors are as of `submit`.
        """
        ids = self.checked(tokens)
        if len(ids) - 1 > self.context_size:  # the last predicts nothing
            raise ContextLengthError(len(ids) - 1, self.context_size)
        return self._queued(Scoring(ids, first, Likelihood(ids[first:], top_logprobs), terms))

    def checked(self, prompt: Items[int]) -> list[int]:
        """Token ids, of which there is at least one. RequestError where they are something else."""
        tokens = list(prompt)
        if not tokens:
            raise RequestError("prompt: expected at least one token, it is empty")
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise RequestError(
                f"prompt: token {wrong} is not in the vocabulary of {self.vocab_size}"
            )
        return tokens

    def _queued(self, sequence: Sequence) -> Request:
        place = sequence.place or self.places.take()[0]
        sequence.place = place
        try:
            place.wait(sequence.prompt_tokens)
            # The loop holds the sequence, not the request: one that nobody holds is cancelled.
            self._post(partial(self._scheduler.add, sequence), partial(_refuse, sequence))
        except SmolrunError:
            place.leave()
            raise
        return Request(sequence)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread, between two steps, and wait for its result."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._post(run, future.set_exception)
        return future.result()

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and what is going on now."""
        return self._counts | {
            "running": len(self._scheduler.running),
            "waiting": self._scheduler.waiting,
            "waiting_tokens": self.places.waiting_tokens,
            "places_taken": self.places.taken,
            "rejected": self.places.rejected,
            "kv_blocks": self.pool.num_blocks,
            "kv_blocks_held": self.pool.held,
            "kv_blocks_cached": self.pool.cached,
        }

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new requests, and wait for those under way.

        Returns:
            Whether all have ended; False where that takes longer than `timeout` seconds.
        """
        self.places.close()
        return self.places.wait_until_free(timeout)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Stop the loop after its current step; requests that are not done end in an error."""
        if self._process != os.getpid():
            return  # a forked child has no loop to stop
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _post(self, action: Callable[[], None], refuse: Callable[[Exception], None]) -> None:
        """Have the loop run `action`, or `refuse` it when the loop ends first."""
        if self._process != os.getpid():
            raise SmolrunError(
                "this model was loaded before the process forked, and its threads stayed in the "
                "parent; load the model after the fork, or start processes with 'spawn'"
            )
        with self._wake:
            if self._closed:
                raise ClosedError("the model is closed")
            if self._thread is None:
                thread = threading.Thread(target=self._loop, name="smolrun", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise ResourceError(f"the system refuses a thread: {error}") from None
                self._thread = thread
            self._inbox.append((action, refuse))
            self._wake.notify()

    # --- the loop's thread ---

    def _loop(self) -> None:
        try:
            while self._take_in():
                try:
                    self._turn()
                except Exception as error:  # a defect of the loop must leave nobody waiting
                    for sequence in self._scheduler.all():
                        self._fail(sequence, error)
        finally:
            with self._wake:
                self._closed = True
                inbox, self._inbox = self._inbox, []
            ending = ClosedError("the model was closed before the answer was complete")
            for sequence in self._scheduler.all():
                self._fail(sequence, ending)
            for _, refuse in inbox:
                refuse(ending)

    def _take_in(self) -> bool:
        """Wait for something to do and take in what has come; False when it is time to end."""
        with self._wake:
            while not (self._inbox or self._closed or self._scheduler.busy):
                self._wake.wait()
            if self._closed:
                return False
            inbox, self._inbox = self._inbox, []
        for action, _ in inbox:
            action()
        return True

    def _turn(self) -> None:
        scheduler = self._scheduler
        now = time.perf_counter()
        for sequence in scheduler.all():
            if sequence.cancelled:
                self._counts["cancelled"] += 1
                self._finish(sequence, "cancelled")
            elif (late := sequence.overdue(now)) is not None:
                self._counts["expired"] += 1
                self._fail(sequence, late)
        try:
            scheduler.admit()
        except Exception as error:
            self._fail(scheduler.first(), error)
        chunks = scheduler.plan()
        if self._handed and chunks:
            self._handed = False
            if self.handover:
                time.sleep(HANDOVER_SECONDS)
        if chunks:
            # Of readers hidden states are wanted: logits would cost more than all else.
            readers = [chunk for chunk in chunks if isinstance(chunk.sequence, Reading)]
            writers = [chunk for chunk in chunks if not isinstance(chunk.sequence, Reading)]
            for group in (writers, readers):
                if group:
                    self._step(group)
        elif scheduler.waiting:
            # Nothing runs that could give blocks back; only forward() holds some.
            sequence = scheduler.first()
            self._fail(
                sequence,
                ResourceError(
                    f"the request may need {blocks_for(sequence.kv_tokens)} KV blocks "
                    f"of {self.pool.num_blocks}, and forward() holds {self.pool.held}; "
                    "call clear_kv_cache(), or set a smaller max_tokens"
                ),
            )

    def _step(self, chunks: list[Chunk]) -> None:
        """Compute chunks and hand out what comes of them."""
        hidden = isinstance(chunks[0].sequence, Reading)
        try:
            for chunk in chunks:
                assert chunk.sequence.table is not None
                self.pool.grow(chunk.sequence.table, chunk.start + chunk.count)
            step = step_arrays(chunks)
            found = self._rows(len(step.logit_rows), hidden)
            self.runner.step(
                step.tokens,
                step.positions,
                step.sequences,
                step.block_tables,
                step.logit_rows,
                *((None, found) if hidden else (found,)),
            )
        except Exception as error:
            # Each alone computes the same bits: only who fails alone is at fault.
            if len(chunks) > 1:
                for chunk in chunks:
                    self._step([chunk])
            else:
                self._fail(chunks[0].sequence, error)
            return
        self._counts["steps"] += 1
        self._counts["step_tokens"] += len(step.tokens)
        if self.on_step is not None:
            self.on_step(len(step.tokens))
        first = 0
        for chunk in chunks:
            own = found[first : first + len(chunk.rows)]  # a view of this chunk's rows
            first += len(own)
            try:
                if isinstance(chunk.sequence, Given):
                    self._take(chunk, chunk.sequence, own)
                else:
                    self._advance(chunk, own[0] if len(own) else None)
            except Exception as error:
                self._fail(chunk.sequence, error)

    def _rows(self, count: int, hidden: bool) -> npt.NDArray[np.float32]:
        """Room for rows of hidden states, or of logits."""
        if hidden:
            return np.empty((count, self.hidden_size), np.float32)
        if count > len(self._logits):  # texts are scored
            return np.empty((count, self.vocab_size), np.float32)
        return self._logits[:count]

    def _advance(self, chunk: Chunk, logits: npt.NDArray[np.float32] | None) -> None:
        """Take note of a computed chunk; logits are those of the sequence's last token."""
        sequence = chunk.sequence
        sequence.computed = chunk.start + chunk.count
        if sequence.computed <= sequence.prompt_tokens and (
            logits is None or chunk.start > sequence.cached_tokens
        ):
            sequence.emit(sequence.output.progress(sequence.computed, sequence.prompt_tokens))
        if logits is None:
            return
        token = sequence.sampler.sample(logits, len(sequence.tokens))
        assert sequence.table is not None
        # Finite logits vouch for every key and value they depend on.
        self.pool.commit(sequence.table, sequence.tokens, sequence.computed)
        reason = sequence.append(token.id)
        handed = False
        if reason != "stop":
            events, stopped = sequence.output.push(token)
            handed = sequence.emit(events)
            reason = "stop" if stopped else reason
        if reason is not None:
            self._finish(sequence, reason)
        else:
            self._handed |= handed

    def _take(self, chunk: Chunk, sequence: Given, rows: npt.NDArray[np.float32]) -> None:
        """Take note of a computed chunk of tokens that were given, with what was wanted of it."""
        sequence.take(rows)
        sequence.computed = chunk.start + chunk.count
        if isinstance(sequence, Scoring) and len(rows):
            assert sequence.table is not None
            self.pool.commit(sequence.table, sequence.tokens, sequence.computed)
        if sequence.computed == sequence.prompt_tokens:
            self._finish(sequence, "stop")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._leave(sequence)
        ending = sequence.ending(reason)
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += ending.prompt_tokens
        self._counts["cached_tokens"] += ending.cached_tokens
        self._counts["completion_tokens"] += ending.completion_tokens
        try:
            sequence.finish(ending)
        except Exception as error:
            self._report(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        bad: list[int] = []
        if isinstance(error, NonFiniteError) and sequence.table is not None:
            bad = self.pool.discard(sequence.table)
            sequence.table = None
            self._counts["corrupted"] += 1
        self._leave(sequence)
        if bad:
            self.runner.zero_blocks(np.array(bad, np.int32))
        self._report(sequence, error)

    def _report(self, sequence: Sequence, error: Exception) -> None:
        self._counts["failed"] += 1
        if not isinstance(error, SmolrunError):
            wrapped = SmolrunError(f"the request failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        sequence.fail(error)

    def _leave(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        if sequence.table is not None:
            self.pool.release(sequence.table)
            sequence.table = None
        if sequence.place is not None:
            sequence.place.leave()


def _refuse(sequence: Sequence, error: Exception) -> None:
    """The loop ended before it took the sequence in."""
    if sequence.place is not None:
        sequence.place.leave()
    sequence.fail(error)
