"""The examples of the README's section on serving do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun import Model
from smolrun.server.service import Settings
from tests.waiting import SECONDS

from .running import Running

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    section = README.read_text().partition("\n## Serve\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Running]:
    with Running(model, Settings(names=("smollm2-135m",))) as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(served: Running) -> None:  # CLI-01
    (script,) = blocks("bash")
    commands = [part for part in script.split("\n\n") if part.strip()]
    assert len(commands) == 3
    # A sanitizer's runtime, which comes first in the Python under test, makes curl wait for ever.
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    replies = []
    for command in commands:
        command = command.replace("http://127.0.0.1:8080", served.url)
        assert served.url in command
        done = subprocess.run(
            ["bash", "-c", command.replace("curl ", "curl -sS --fail-with-body ", 1)],
            capture_output=True, text=True, check=False, timeout=SECONDS, env=environ,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        replies.append(done.stdout)
    assert json.loads(replies[0])["choices"][0]["message"]["content"] in ("yes", "no")
    assert replies[1].endswith("data: [DONE]\n\n")
    assert len(json.loads(replies[2])["data"]) == 2


def test_python(served: Running) -> None:  # CLI-01
    (script,) = blocks("python")
    script = script.replace("http://127.0.0.1:8080", served.url)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
