"""What the engine asks of the thing that runs a program."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class Runner(Protocol):
    """Runs steps of one program over one pool of KV blocks; one step at a time."""

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block of the KV cache, all layers."""

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes held, by purpose."""

    def step(
        self,
        tokens: Int32Array,  # (n,)
        positions: Int32Array,  # (n,)
        sequences: Int32Array,  # (n,) row of block_tables that a token belongs to
        block_tables: Int32Array,  # (sequences, blocks)
        logit_rows: Int32Array,  # (r,) tokens whose logits are wanted
        logits: Float32Array | None,  # (r, vocab_size), written; None: not computed
        hidden: Float32Array | None = None,  # (r, hidden_size), written: after the last norm
    ) -> None:
        """Store K and V of n tokens; compute the logits, or the hidden states, of r of them."""

    def zero_blocks(self, blocks: Int32Array, /) -> None:
        """Wipe KV blocks."""
