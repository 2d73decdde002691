"""Waits that end: what never comes fails its test, instead of holding up the run.

The limit is no measure of speed: it is far above what a machine takes that does much else beside.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

SECONDS = 120.0


def eventually(condition: Callable[[], Any], seconds: float = SECONDS) -> bool:
    """Whether a condition comes true before the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def started(target: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """A thread that runs, and that the end of the process does not wait for."""
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def joined(threads: Iterable[threading.Thread]) -> None:
    """Wait for threads to end."""
    end = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0.1))
        assert not thread.is_alive(), f"{thread.name} does not end"
