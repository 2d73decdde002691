"""The OpenAPI document matches what the server does: schemathesis asks everything it allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from smolrun import Model
from smolrun.server import openapi
from smolrun.server.app import ROUTES
from smolrun.server.limits import Limits
from smolrun.server.service import Settings

from .running import Running

EXAMPLES = int(os.environ.get("SMOLRUN_SCHEMA_EXAMPLES", "5"))
DOCUMENT = openapi.document(ROUTES)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
api = schemathesis.openapi.from_dict(DOCUMENT)
api.config.generation.update(modes=list(GenerationMode))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    """Answers without max_tokens run to the end of the context: a small one."""
    limits = replace(Limits(), total_seconds=5)
    with (
        Model(folder, threads=1, max_sequences=4, context_size=96) as model,
        Running(model, Settings(names=("tiny",), limits=limits)) as running,
    ):
        yield running


@api.parametrize()
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)
def test_the_document(case: Any, served: Running) -> None:  # API-01
    response = case.call(base_url=served.url, timeout=60)
    # The one 5xx of this server's limits: an answer that ran into its total time.
    if response.status_code == 504:
        assert response.json()["error"]["code"] == "timeout"
        return
    case.validate_response(response, checks=CHECKS)


def test_it_is_well_after_all(served: Running) -> None:
    served.check_health()


def test_every_route_is_in_the_document() -> None:
    for route in ROUTES:
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        assert operation["summary"]
        assert "200" in operation["responses"]
        assert ("requestBody" in operation) == (route.body is not None)
