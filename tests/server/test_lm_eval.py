"""lm-eval, through /v1/completions, finds the numbers of `Model.score`.

Not run where lm-eval is missing, and it is in no extra: `pip install "lm_eval[api]==0.4.13"
transformers`, then `pytest -m long tests/server/test_lm_eval.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smolrun import Model
from smolrun.server.service import Settings
from tests.waiting import SECONDS

from .running import Running

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {
        "question": "The capital of France is",
        "choices": [" Paris", " a town in Spain"],
        "answer": 0,
    },
    {"question": "Water boils at", "choices": [" 100 degrees", " noon", " ключ"], "answer": 0},
    {"question": "The sky is", "choices": [" green", " blue", " made of stone"], "answer": 1},
]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_the_same_numbers(model: Model, folder: Path, tmp_path: Path) -> None:
    data, tokenizer, output = (tmp_path / name for name in ("data.jsonl", "tokenizer", "output"))
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    tokenizer.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, tokenizer)
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    with Running(model, Settings(names=("tiny",))) as running:
        arguments = {
            "model": "tiny",
            "base_url": running.url + "/v1/completions",
            "tokenizer": tokenizer,
            "num_concurrent": 2,
            "max_length": 2048,
        }
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
             "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
             "--tasks", "tiny", "--include_path", str(tmp_path), "--log_samples",
             "--output_path", str(output)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
            capture_output=True, text=True, check=False, timeout=2 * SECONDS,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = output.rglob("samples*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(QUESTIONS)
    for row in rows:
        found = [float(answers[0][0]) for answers in row["resps"]]
        scores = model.score(row["doc"]["question"], row["doc"]["choices"])
        # Sums of the same numbers; lm-eval adds them up in another order.
        assert found == pytest.approx([score.logprob for score in scores], rel=1e-12)
