"""Showing an answer while it comes: text on stdout, thinking dim, one line of statistics."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from smolrun.cli.terminal import DIM, RESET, Console, is_terminal, printable

if TYPE_CHECKING:
    from smolrun.api import Result, Stream


@contextlib.contextmanager
def stops_on_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C ends the answer, whose events still come to their end; a second one raises."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    presses = 0

    def interrupted(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt
        cancel()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class AnswerPrinter:
    """Prints the events of answers.

    Thinking is shown dim where the answer goes to a terminal, and on stderr where it does not, so
    that a pipe carries the answer alone.
    """

    def __init__(self, console: Console, hide_thinking: bool = False) -> None:
        self.console = console
        self.hide_thinking = hide_thinking
        self._thinking = False
        self._began = False
        self._ends_line = True

    def show(self, stream: Stream) -> Result:
        """Print an answer to its end, or to the Ctrl-C that ends it, and return it."""
        from smolrun.api import EndEvent, ProgressEvent, ReasoningEvent, TextEvent

        console = self.console
        result: Result | None = None
        self._began, self._ends_line = False, True
        with stops_on_interrupt(stream.cancel):
            try:
                for event in stream:
                    if isinstance(event, ProgressEvent):
                        console.working("reading the prompt", event.done, event.total)
                    elif isinstance(event, ReasoningEvent):
                        self._show_thinking(event.text)
                    elif isinstance(event, TextEvent):
                        self._show_text(event.text)
                    elif isinstance(event, EndEvent):
                        result = event.result
            finally:
                console.clear_progress()
                self._end_thinking()
        assert result is not None, "a stream ends with an EndEvent or an error"
        if not self._ends_line:
            console.write("\n")
        return result

    def _show_text(self, text: str) -> None:
        if self._thinking:
            self._end_thinking()
        if not self._began and is_terminal(self.console.out):
            text = text.lstrip("\n")  # no empty lines before an answer that a person reads
        if text:
            self.console.write(text)
            self._began = True
            self._ends_line = text.endswith("\n")

    def _show_thinking(self, text: str) -> None:
        console = self.console
        if self.hide_thinking:
            console.progress("thinking…")
            return
        on_terminal = is_terminal(console.out)
        if not on_terminal and console.quiet:
            return
        stream, color = (
            (console.out, console.color_out) if on_terminal else (console.err, console.color_err)
        )
        console.clear_progress()
        if not self._thinking:
            self._thinking = True
            text = text.lstrip("\n")
            stream.write(DIM if color else "")
        stream.write(printable(text))
        stream.flush()

    def _end_thinking(self) -> None:
        if not self._thinking:
            return
        self._thinking = False
        console = self.console
        if is_terminal(console.out):
            console.out.write((RESET if console.color_out else "") + "\n\n")
            console.out.flush()
        else:
            console.err.write((RESET if console.color_err else "") + "\n")
            console.err.flush()


def statistics_line(result: Result) -> str:
    """What an answer cost: `34 prompt tokens, 176/s · 120 tokens, 31.4/s · 4.1 s`."""
    usage, timings = result.usage, result.timings
    prompt = f"{usage.prompt_tokens} prompt tokens"
    if usage.cached_tokens:
        prompt += f" ({usage.cached_tokens} cached)"
    if timings.prompt_per_second:
        prompt += f", {timings.prompt_per_second:.0f}/s"
    answer = f"{usage.completion_tokens} token{'s' * (usage.completion_tokens != 1)}"
    if usage.reasoning_tokens:
        ended = {"budget": ", its budget", "loop": ", stopped in a loop"}
        why = ended.get(result.thinking_stopped_by or "", "")
        answer += f" ({usage.reasoning_tokens} thinking{why})"
    if timings.predicted_per_second:
        answer += f", {timings.predicted_per_second:.1f}/s"
    parts = [prompt, answer]
    if usage.completion_tokens:
        parts.append(f"first after {timings.prompt_ms / 1000:.2f} s")
    if result.finish_reason == "length":
        parts.append("cut off at the limit of tokens (-n, -c)")
    elif result.finish_reason == "cancelled":
        parts.append("stopped")
    return " · ".join(parts)


def as_json(result: Result, model: str) -> dict[str, Any]:
    """A result as `--json` prints it."""
    timings = dataclasses.asdict(result.timings)
    timings["prompt_per_second"] = result.timings.prompt_per_second
    timings["predicted_per_second"] = result.timings.predicted_per_second
    return {
        "model": model,
        "text": result.text,
        "reasoning": result.reasoning,
        "finish_reason": result.finish_reason,
        "thinking_stopped_by": result.thinking_stopped_by,
        "usage": dataclasses.asdict(result.usage),
        "timings": timings,
        "seed": result.seed,
    }
