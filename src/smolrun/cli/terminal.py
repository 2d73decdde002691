"""What a terminal gets to see: colour, one line of progress, notes. Data goes to stdout alone.

Everything here that is not data goes to stderr, and colour goes only where a person looks.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

DIM, BOLD, RED, RESET = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"
_CLEAR_LINE = "\r\x1b[K"
_REDRAW_SECONDS = 0.1

# A model may write escape sequences that retitle a terminal or worse; it gets to show text only.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees this stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def use_color(stream: TextIO, choice: str = "auto") -> bool:
    """Whether to colour a stream: as asked for, else on terminals without NO_COLOR."""
    if choice != "auto":
        return choice == "on"
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and _understands_escapes()


def _understands_escapes() -> bool:
    return os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """A model's text without the control characters that could drive a terminal."""
    return _CONTROL.sub("", text)


def human_bytes(size: float) -> str:
    """A size as disks and networks count it: "98.4 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


class Console:
    """stdout for data, stderr for everything else, and what the flags say about both."""

    def __init__(self, color: str = "auto", quiet: bool = False, verbose: int = 0) -> None:
        self.color_out = use_color(self.out, color)
        self.color_err = use_color(self.err, color)
        self.quiet = quiet
        self.verbose = verbose
        self._progress_shown = False
        self._progress_at = 0.0
        self._started: dict[str, tuple[float, int]] = {}

    @property
    def out(self) -> TextIO:
        """Where data goes."""
        return sys.stdout

    @property
    def err(self) -> TextIO:
        """Where everything else goes."""
        return sys.stderr

    @property
    def interactive(self) -> bool:
        """Whether a person types and sees the answer."""
        return is_terminal(sys.stdin) and is_terminal(self.out)

    def write(self, text: str) -> None:
        """Data, at once."""
        self.clear_progress()
        self.out.write(printable(text) if is_terminal(self.out) else text)
        self.out.flush()

    def print(self, text: str = "") -> None:
        """A line of data."""
        self.write(text + "\n")

    def dim(self, text: str) -> str:
        """Text for stderr, grey where there is colour."""
        return f"{DIM}{text}{RESET}" if self.color_err else text

    def note(self, text: str) -> None:
        """A grey line on stderr, unless quiet."""
        if not self.quiet:
            self.clear_progress()
            self.err.write(self.dim(printable(text)) + "\n")
            self.err.flush()

    def error(self, text: str) -> None:
        """An error, on one line."""
        self.clear_progress()
        prefix = f"{RED}error:{RESET}" if self.color_err else "error:"
        self.err.write(f"{prefix} {printable(' '.join(text.split()))}\n")
        self.err.flush()

    def progress(self, text: str) -> None:
        """Show a line of progress in place of the last; on terminals only."""
        now = time.monotonic()
        if self.quiet or not is_terminal(self.err) or now - self._progress_at < _REDRAW_SECONDS:
            return
        self._progress_at, self._progress_shown = now, True
        width = shutil.get_terminal_size().columns - 1
        self.err.write(_CLEAR_LINE + self.dim(text[:width]))
        self.err.flush()

    def clear_progress(self) -> None:
        """Take the line of progress away."""
        if self._progress_shown:
            self._progress_shown = False
            self._progress_at = 0.0
            self.err.write(_CLEAR_LINE)
            self.err.flush()

    def downloading(self, what: str, done: int, total: int | None) -> None:
        """Progress of a download: share, sizes, speed and time left."""
        self._transfer("downloading", what, done, total)

    def _transfer(self, verb: str, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if what not in self._started:
            self._started[what] = (now, done)
            if not is_terminal(self.err):
                size = f" ({human_bytes(total)})" if total else ""
                self.note(f"{verb} {what}{size}")
        begun, first = self._started[what]
        rate = (done - first) / (now - begun) if now > begun else 0.0
        if not total:
            self.progress(f"{what}  {human_bytes(done)}  {human_bytes(rate)}/s")
            return
        room = max(shutil.get_terminal_size().columns - 54, 12)
        shown = what if len(what) <= room else what[: room - 1] + "…"
        line = f"{shown} {bar(done / total)} of {human_bytes(total)}"
        if rate > 0:
            line += f", {human_bytes(rate)}/s, {(total - done) / rate:.0f} s left"
        self.progress(line)
        if done >= total:
            del self._started[what]
            self.clear_progress()

    def writing(self, what: str, done: int, total: int) -> None:
        """Progress of a file that is made: share, sizes, speed and time left."""
        self._transfer("writing", what, done, total)

    def working(self, what: str, done: int, total: int) -> None:
        """Progress of other work; shown once it has taken a second."""
        now = time.monotonic()
        begun, _ = self._started.setdefault(what, (now, 0))
        if done >= total:
            del self._started[what]
            self.clear_progress()
        elif now - begun > 1.0 and total:
            self.progress(f"{what}  {bar(done / total)}  {done} of {total}")


def bar(share: float) -> str:
    """A bar of progress with its share: `━━━━────  50 %`."""
    width = 24 if shutil.get_terminal_size().columns >= 120 else 10
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "━" * filled + "─" * (width - filled) + f" {100 * share:3.0f} %"


def table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Rows as columns of equal width; the columns numbered in `right` end flush."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
