"""Which columns of a model's weights matter: the squares of what they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, cast

import numpy as np

from smolrun.api import Model
from smolrun.engine.forward import Forward
from smolrun.engine.likelihood import WINDOW_TOKENS
from smolrun.engine.runner import Runner
from smolrun.errors import RequestError
from smolrun.files.gguf_names import gguf_name
from smolrun.files.imatrix import ImportanceMatrix
from smolrun.model.program import LinearAdd, NormLogits, NormQKV, NormSwiGLU, Program

# Rows of logits in memory at a time: 64 MB with a vocabulary of 128k.
_ROWS = 128


class SummingRunner(Runner, Protocol):
    """A runner that adds up the squares of what its weights are multiplied with."""

    def collect_squares(self, on: bool) -> None:
        """Whether the steps from now on do, from 0."""

    def squares(self) -> list[list[float]]:
        """The sums so far, [operation][column]; empty for an operation without products."""


def measure_importance(
    model: Model,
    text: str,
    name: str,
    *,
    context: int = WINDOW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> ImportanceMatrix:
    """Have a model read a text and add up, for each weight, the squares of its inputs.

    Args:
        model: no request of it may be under way.
        text: cut into pieces, each of which is read from an empty cache; a part of a piece that is
            left at the end does not count.
        name: of the text, for the file.
        context: tokens of a piece.
        progress: told the pieces done and all.

    Raises:
        RequestError: the text is shorter than a piece, or a piece longer than the context.
    """
    tokens = np.array(model.tokenize(text, parse_special=False), np.int32)
    pieces = len(tokens) // context
    if not pieces:
        raise RequestError(
            f"the text has {len(tokens)} tokens, and a piece {context}; take a longer text or "
            "smaller pieces"
        )
    engine = model.loaded.engine
    runner = cast(SummingRunner, engine.runner)
    cache = Forward(engine)
    engine.call(lambda: runner.collect_squares(True))
    try:
        for piece in range(pieces):
            if progress is not None:
                progress(piece, pieces)
            # Logits of all, so that the head sees every token as the other products do.
            for begin in range(0, context, _ROWS):
                first = piece * context + begin
                end = min(first + _ROWS, (piece + 1) * context)
                cache.forward(tokens[first:end], begin, all_positions=True)
        found = engine.call(runner.squares)
    finally:
        cache.clear()
        engine.call(lambda: runner.collect_squares(False))
    sums = {
        gguf_name(weight): np.array(found[index], np.float32)
        for index, weight in multiplied(model.loaded.program)
    }
    counts = dict.fromkeys(sums, pieces * context)
    return ImportanceMatrix(sums, counts, (name,), pieces, context)


def multiplied(program: Program) -> Iterator[tuple[int, str]]:
    """Every weight that is a factor of a product, after the index of its operation."""
    for index, operation in enumerate(program.operations):
        if isinstance(operation, NormQKV):
            weights = [operation.q, operation.k, operation.v]
        elif isinstance(operation, NormSwiGLU):
            weights = [operation.gate, operation.up]
        elif isinstance(operation, (LinearAdd, NormLogits)):
            weights = [operation.weight]
        else:
            continue
        for weight in weights:
            yield index, weight
