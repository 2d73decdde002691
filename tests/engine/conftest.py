"""An engine on the runner that checks what it is given."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.fakes import fake_engine, fake_of


@pytest.fixture
def engine() -> Any:
    engine = fake_engine()
    yield engine
    fake_of(engine).go_on()
    engine.close()
