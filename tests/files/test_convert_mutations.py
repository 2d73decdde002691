"""Sound files changed at random and then converted: refused, or the same model as before."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun import convert
from smolrun.errors import ModelFormatError, ModelNotFoundError
from smolrun.model.random import random_weights
from smolrun.quant.blocks import tensor_values
from tests.models import hugging_face_values, save_folder, small_config

from .images import tiny_gguf
from .loading import open_whole
from .test_gguf_vocabulary import ROWS, trained
from .test_mutations import MUTATIONS, mutate_gguf

pytestmark = pytest.mark.fuzz


def survives(source: Path, target: Path, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether the model is converted; then target and source must be the same model."""
    caplog.clear()
    try:
        convert(source, target)
    except (ModelFormatError, ModelNotFoundError) as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.isprintable()
        assert os.listdir(target.parent) == []
        return False
    (before, tokenizer), (after, again) = open_whole(source), open_whole(target)
    unstored: dict[str, Any] = {"bos_token_id": None, "eos_token_ids": (), "pad_token_id": None}
    for field in ("rms_norm_eps", "rope_theta"):
        unstored[field] = float(np.float32(getattr(after.config, field)))
        assert unstored[field] == np.float32(getattr(before.config, field))
    assert replace(after.config, **unstored) == replace(before.config, **unstored)
    for name, tensor in before.tensors.items():
        assert (tensor_values(after.tensors[name]) == tensor_values(tensor)).all()
    if tokenizer is not None and "GGUF can not say" not in caplog.text:
        assert again is not None
        for text in ("<|im_start|>babc d", "abc<think>\n 12345 Ünï"):
            assert again.encode(text) == tokenizer.encode(text)
    before.close()
    after.close()
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    choose = random.Random(20251125)
    (tmp_path / "out").mkdir()
    path = tmp_path / "mutated.gguf"
    done = 0
    for _ in range(MUTATIONS):
        image = copy.deepcopy(tiny_gguf())
        for _ in range(choose.randint(1, 2)):
            mutate_gguf(image, choose)
        path.write_bytes(image.to_bytes())
        done += survives(path, tmp_path / "out" / "folder", caplog)
        path.unlink()
    assert MUTATIONS // 50 < done < MUTATIONS


def places(values: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container and key in a JSON value, but few of those of the vocabulary."""
    keys: list[Any] = list(values) if isinstance(values, dict) else list(range(len(values)))
    for key in keys[:40]:
        found.append((values, key))
        if isinstance(values[key], (dict, list)):
            places(values[key], found)
    return found


ODD = [None, True, 0, 1, -1, 2.5, 1 << 40, "", "x", "\ud800", "a b", [], {}, [1], {"a": 1}, "BPE"]


def test_mutated_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    choose = random.Random(20251126)
    (tmp_path / "out").mkdir()
    config = small_config(vocab_size=ROWS)
    folder = save_folder(config, random_weights(config, 1), tmp_path / "folder")
    sound = {
        "config.json": hugging_face_values(config),
        "tokenizer.json": json.loads(trained("smollm").to_str()),
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": "x"},
        "generation_config.json": {"temperature": 0.5, "top_k": 5, "eos_token_id": 2},
    }
    done = 0
    for _ in range(MUTATIONS):
        files = copy.deepcopy(sound)
        container, key = choose.choice(places(files, []))
        action = choose.randrange(3)
        if action == 0:
            del container[key]
        elif action == 1:
            container[key] = copy.deepcopy(choose.choice(ODD))
        else:
            other, at = choose.choice(places(files, []))
            container[key] = copy.deepcopy(other[at])
        for name in sound:
            (folder / name).unlink(missing_ok=True)
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values))
        done += survives(folder, tmp_path / "out" / "m.gguf", caplog)
    assert MUTATIONS // 50 < done < MUTATIONS
