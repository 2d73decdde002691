"""`smolrun batch`: every request answered once, as the server would, whatever happens between."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun import Model, OutputError, RequestError
from smolrun.cli.main import main
from smolrun.integrations import batch
from smolrun.integrations.batch import Done, run_batch
from tests.api.tiny import make_folder
from tests.package import SOURCE
from tests.waiting import SECONDS, eventually

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Model(folder, threads=1, max_sequences=4) as model:
        yield model


def request(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": f"number {number}"}], **body}
    body = {"max_tokens": 4, "seed": number, **body}
    return {"custom_id": str(number), "method": "POST", "url": url, "body": body}


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in requests))
    return path


def read(path: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records), "a line was written twice"
    return found


def test_answers_are_those_of_the_api(model: Model, tmp_path: Path) -> None:
    requests = [request(n) for n in range(10)]
    requests += [request(n, TEXT, prompt="The sky") for n in range(10, 14)]
    source, target = write(tmp_path / "in", requests), tmp_path / "out"
    told: list[tuple[int, int]] = []
    done = run_batch(
        model, source, target, parallel=4, progress=lambda done, total: told.append((done, total))
    )
    assert done == Done(total=14, before=0, failed=0)
    assert told == [(n, 14) for n in range(1, 15)]
    found = read(target)
    assert set(found) == {str(n) for n in range(14)}
    for n in range(10):
        record = found[str(n)]
        assert (record["error"], record["response"]["status_code"]) == (None, 200)
        body = record["response"]["body"]
        assert (
            body["choices"][0]["message"]["content"]
            == model.chat(f"number {n}", max_tokens=4, seed=n).text
        )
        assert body["timings"]["predicted_n"] >= 1
        assert record["seconds"] >= 0
        assert record["response"]["request_id"]
    text = found["12"]["response"]["body"]["choices"][0]["text"]
    assert text == model.generate("The sky", max_tokens=4, seed=12).text


def test_embeddings(model: Model, tmp_path: Path) -> None:
    line = {
        "custom_id": "e",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"input": ["The sky", "a"]},
    }
    target = tmp_path / "out"
    assert run_batch(model, write(tmp_path / "in", [line]), target, parallel=2).failed == 0
    found = read(target)["e"]["response"]["body"]["data"]
    vectors = [each["embedding"] for each in found]
    np.testing.assert_allclose(vectors, model.embed(["The sky", "a"]), atol=1e-6)


def test_what_can_not_be_honoured_is_told_in_its_line(model: Model, tmp_path: Path) -> None:
    requests = [
        request(0),
        request(1, temperature=-1),
        request(2, stream=True),
        request(3, url="/v1/images"),
        request(4, unknown_field=1),
        request(5, model="another"),
        request(6, TEXT, prompt="x " * 2000),
    ]
    target = tmp_path / "out"
    done = run_batch(model, write(tmp_path / "in", requests), target, parallel=2)
    assert (done.total, done.failed) == (7, 6)
    responses = [read(target)[str(n)]["response"] for n in range(7)]
    assert [r["status_code"] for r in responses] == [200, 400, 400, 400, 400, 404, 400]
    errors = [r["body"]["error"] for r in responses[1:]]
    assert [e["param"] for e in errors[:4]] == ["temperature", "stream", "url", "unknown_field"]
    assert errors[5]["code"] == "context_length_exceeded"


def test_a_job_goes_on_where_it_stopped(model: Model, tmp_path: Path) -> None:
    requests = [request(n) for n in range(8)]
    source, target = write(tmp_path / "in", requests), tmp_path / "out"
    run_batch(model, write(tmp_path / "some", requests[:3]), target, parallel=1)
    first = target.read_bytes()
    with target.open("ab") as file:  # the process was cut off while it wrote
        file.write(b'{"id": "batch_req_1", "custom_id": "3", "respon')
    assert run_batch(model, source, target, parallel=3) == Done(total=8, before=3, failed=0)
    assert target.read_bytes().startswith(first)
    assert set(read(target)) == {str(n) for n in range(8)}
    whole = target.read_bytes()
    assert run_batch(model, source, target, parallel=3) == Done(total=8, before=8, failed=0)
    assert target.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_killed_and_started_again(folder: Path, tmp_path: Path) -> None:
    """However often it is killed, in the end each request has one line."""
    source = write(tmp_path / "in", [request(n, max_tokens=40, ignore_eos=True) for n in range(30)])
    target = tmp_path / "out"
    command = [
        sys.executable, "-m", "smolrun.cli.main", "batch", str(source), str(target),
        "-m", str(folder), "-t", "1", "--parallel", "4",
    ]  # fmt: skip
    command[1:3] = ["-c", "import sys; from smolrun.cli.main import main; sys.exit(main())"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    kills = 0
    for lines in (1, 8, 15):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as job:

            def far_enough(job: subprocess.Popen[bytes] = job, lines: int = lines) -> bool:
                written = target.read_bytes().count(b"\n") if target.exists() else 0
                return written >= lines or job.poll() is not None

            try:
                assert eventually(far_enough)
                kills += job.poll() is None
            finally:
                job.kill()
    assert kills
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert set(read(target)) == {str(n) for n in range(30)}
    assert "of 30 requests answered" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "line 2: no JSON"),
        ("[" * 100_000, "line 2: no JSON"),
        ("[]", "line 2: expected an object"),
        (json.dumps({**request(1), "custom_id": 5}), "line 2: custom_id: expected a text, got 5"),
        (json.dumps({**request(1), "custom_id": ""}), "line 2: custom_id: expected a text"),
        (json.dumps({**request(1), "body": []}), "line 2: body: expected an object"),
        (json.dumps({**request(1), "method": "GET"}), "line 2: method: expected POST"),
        (json.dumps(request(0)), "line 2: custom_id '0' is that of line 1"),
    ],
)
def test_a_bad_input_runs_nothing(model: Model, tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "in"
    source.write_text(json.dumps(request(0)) + "\n" + line + "\n")
    before = model.statistics()["requests"]
    with pytest.raises(RequestError, match=message):
        run_batch(model, source, tmp_path / "out", parallel=2)
    assert model.statistics()["requests"] == before
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_none_is_left_alone(model: Model, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [request(0)]), tmp_path / "out"
    target.write_text("my notes\n")
    with pytest.raises(OutputError, match="line 1: no line of a batch's output"):
        run_batch(model, source, target, parallel=2)
    assert target.read_text() == "my notes\n"


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_two_processes_do_not_write_one_output(model: Model, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", [request(0)]), tmp_path / "out"
    with (
        batch._Output(target),
        pytest.raises(OutputError, match="another process"),
    ):
        run_batch(model, source, target, parallel=2)
    run_batch(model, source, target, parallel=2)


def test_a_full_disk_ends_the_job(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "in", [request(n) for n in range(9)]), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run_batch(model, source, target, parallel=2)
    run_batch(model, source, target, parallel=2)
    assert set(read(target)) == {str(n) for n in range(9)}
    assert model.statistics()["kv_blocks_held"] == 0


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = write(tmp_path / "in", [request(0), request(1, top_p=5)]), tmp_path / "out"
    words = ["batch", str(source), str(target), "-m", str(folder), "-t", "1"]
    assert main(words) == 0
    assert "2 of 2 requests answered; 1 failed" in capsys.readouterr().err
    assert main(words) == 0
    assert "0 of 2 requests answered, 2 were already" in capsys.readouterr().err
    assert main(["batch", str(tmp_path / "none"), str(target)]) == 2
    assert main(["batch", str(source), str(source)]) == 2


def test_command_notes_no_requests_and_leaves_logging_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("smolrun")
    before = logger.handlers[:], logger.level, logger.propagate
    source, target = write(tmp_path / "in", [request(n) for n in range(3)]), tmp_path / "out"
    assert main(["batch", "-v", "-m", str(folder), str(source), str(target)]) == 0
    assert len(read(target)) == 3
    assert "request" not in capsys.readouterr().err.splitlines()
    assert (logger.handlers, logger.level, logger.propagate) == before
