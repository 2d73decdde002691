"""A weight as it lies in its file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from smolrun.quant.types import WeightType


@dataclass(frozen=True)
class Tensor:
    """A weight as it lies in its file: a view of the mapped bytes, never a copy."""

    name: str  # canonical (Hugging Face) name, e.g. model.layers.0.self_attn.q_proj.weight
    type: WeightType
    shape: tuple[int, ...]  # (out, in) for a matrix, (width,) for a vector
    data: npt.NDArray[np.uint8]  # (product of shape / block_weights * block_bytes,)
    origin: str  # where it came from, for messages: "model.gguf: blk.0.attn_q.weight"
    # Size of a head whose rows stand in GGUF's interleaved order (row 2i+j of a head holds row
    # j*head_dim/2+i), or 0 where rows stand as in Hugging Face files.
    interleaved_head_dim: int = 0

    @property
    def rows(self) -> int:
        """Output features of a matrix; 1 for a vector."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        """Input features, the length of a row."""
        return self.shape[-1]

    def renamed(self, name: str) -> Tensor:
        """The same bytes under another name."""
        return replace(self, name=name)
