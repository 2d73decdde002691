"""A writer of safetensors files: the header at once, then the tensors piece by piece.

Source: the format's description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smolrun.quant.types import WeightType

# As transformers and the Hub's library split a model.
MAX_SHARD_BYTES = 5_000_000_000

_DTYPES = {WeightType.F32: "F32", WeightType.F16: "F16", WeightType.BF16: "BF16"}


@dataclass(frozen=True)
class SafetensorsInfo:
    """A tensor that is to be written."""

    name: str
    type: WeightType  # F32, F16 or BF16
    shape: tuple[int, ...]  # (out, in) for a matrix, (width,) for a vector

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.type.block_bytes


def safetensors_order(tensors: Sequence[SafetensorsInfo]) -> list[SafetensorsInfo]:
    """The order in which the format's own library writes tensors: wider types first, then names."""
    rank = {WeightType.F32: 0, WeightType.BF16: 1, WeightType.F16: 2}
    return sorted(tensors, key=lambda tensor: (rank[tensor.type], tensor.name))


def safetensors_header(tensors: Sequence[SafetensorsInfo]) -> bytes:
    """Everything before the data of these tensors, which follows in their order without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.type],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shards(
    tensors: Sequence[SafetensorsInfo], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[SafetensorsInfo]]:
    """File names and what stands in each: one file, or as many as keep below `max_bytes` each.

    A tensor that is larger by itself gets a file of its own.
    """
    groups: list[list[SafetensorsInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": safetensors_order(groups[0])}
    return {
        f"model-{index:05}-of-{len(groups):05}.safetensors": safetensors_order(group)
        for index, group in enumerate(groups, 1)
    }
