"""What model cards say, in the keys of GGUF and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from smolrun.files.model_card import (
    card_metadata,
    card_text,
    name_parts,
    read_card,
    size_label,
    title,
)

CARD = """---
library_name: transformers
license: apache-2.0
language:
- en
- fr
tags: [chat, "a b", smollm]
pipeline_tag: text-generation
base_model:
- HuggingFaceTB/SmolLM3-3B-Base
datasets:
  - HuggingFaceTB/smoltalk2   # the data
  - https://example.com/x
model-index:
- name: foo
  results:
  - task: {type: x}
author: 'it''s me'
description: "a: b"
odd: !!python/object x
---
# A model
license: mit
"""
# What llama.cpp's converter wrote into its GGUF for this card.
EXPECTED = {
    "general.author": "it's me",
    "general.description": "a: b",
    "general.license": "apache-2.0",
    "general.base_model.count": 1,
    "general.base_model.0.name": "SmolLM3 3B Base",
    "general.base_model.0.organization": "HuggingFaceTB",
    "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM3-3B-Base",
    "general.dataset.count": 2,
    "general.dataset.0.name": "Smoltalk2",
    "general.dataset.0.organization": "HuggingFaceTB",
    "general.dataset.0.repo_url": "https://huggingface.co/HuggingFaceTB/smoltalk2",
    "general.dataset.1.repo_url": "https://example.com/x",
    "general.tags": ["chat", "a b", "smollm", "text-generation"],
    "general.languages": ["en", "fr"],
}


def card_of(folder: Path, text: str) -> dict[str, Any]:
    (folder / "README.md").write_text(text)
    return {key: typed.value for key, typed in card_metadata(read_card(folder)).items()}


def test_a_card(tmp_path: Path) -> None:
    assert card_of(tmp_path, CARD) == EXPECTED


def test_a_card_that_we_write_says_the_same(tmp_path: Path) -> None:
    assert card_of(tmp_path, card_text(EXPECTED, "A model")) == EXPECTED


@given(
    st.dictionaries(
        st.sampled_from(["general.name", "general.license", "general.description"]),
        st.text(min_size=1).filter(lambda text: text.isprintable()),
    ),
    st.lists(st.text(min_size=1).filter(lambda text: text.isprintable()), max_size=3),
)
def test_any_text_is_written_as_yaml_and_read_again(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, Any], tags: list[str]
) -> None:
    metadata = {**texts, **({"general.tags": tags} if tags else {})}
    text = card_text(metadata, "A model")
    folder = tmp_path_factory.mktemp("card")
    assert card_of(folder, text) == metadata
    front = yaml.safe_load(text.split("---\n")[1]) or {}
    assert front == {key.removeprefix("general."): value for key, value in metadata.items()}


@pytest.mark.parametrize(
    "text", ["", "# A model\n---\nlicense: mit\n---\n", "---\nlicense: mit\n", "---\n---\n", "\0\n"]
)
def test_no_card(tmp_path: Path, text: str) -> None:
    assert card_of(tmp_path, text) == {}


def test_licenses_and_a_base_named_by_its_address(tmp_path: Path) -> None:
    text = (
        "---\nlicense:\n- mit\n- other\nbase_model: https://huggingface.co/a-b/SmolLM2-135M-v1\n---"
    )
    assert card_of(tmp_path, text) == {
        "general.license": "mit,other",
        "general.base_model.count": 1,
        "general.base_model.0.name": "SmolLM2 135M v1",
        "general.base_model.0.version": "v1",
        "general.base_model.0.organization": "A B",
        "general.base_model.0.repo_url": "https://huggingface.co/a-b/SmolLM2-135M-v1",
    }


def test_names() -> None:
    assert title("tiny-smollm3-v2") == "Tiny Smollm3 v2"
    assert name_parts("SmolLM2-1.7B-Instruct", 1_711_376_384) == {
        "basename": "SmolLM2",
        "size_label": "1.7B",
        "finetune": "Instruct",
    }
    assert name_parts("my-llama-360m-chat-v2", 361_821_120) == {
        "basename": "my-llama",
        "size_label": "360M",
        "finetune": "chat",
        "version": "v2",
    }
    assert name_parts("SmolLM2-3B", 5_000_000) == {}
    assert name_parts("smollm") == {}


@pytest.mark.parametrize(
    ("parameters", "label"),
    [
        (134_515_008, "135M"),
        (5_314_816, "5.3M"),
        (3_075_098_624, "3.1B"),
        (1_711_376_384, "1.7B"),
        (999_999, "1000K"),
        (12, "0.01K"),
    ],
)
def test_size_labels(parameters: int, label: str) -> None:
    assert size_label(parameters) == label
