"""Malformed model files, written by this script; none is kept.

Each case says which words the error must hold: the field, and the value where one is at fault.
"""

from __future__ import annotations

from .corpus_case import Case
from .corpus_folders import folder_cases, safetensors_cases
from .corpus_gguf import container_cases, tensor_cases, value_cases
from .corpus_metadata import configuration_cases, tokenizer_cases


def cases() -> list[Case]:
    """All of them, more than three hundred."""
    return [
        case
        for part in (
            container_cases,
            tensor_cases,
            value_cases,
            tokenizer_cases,
            configuration_cases,
            safetensors_cases,
            folder_cases,
        )
        for case in part()
    ]
