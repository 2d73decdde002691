"""From a program and its weights to a native runner."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from smolrun import _core
from smolrun.errors import ResourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from smolrun.model.program import Program

BLOCK_TOKENS = 32  # tokens in a block of the KV cache

# What the inputs of products are rounded to. With quantized weights: 16 bits everywhere, or 8 bits
# but for the products where that costs most. With F16 and BF16 weights: nothing, or 16 bits, to
# which these weights are rounded as well (docs/decisions.md).
Activations = Literal["exact", "fast"]
DEFAULT_ACTIVATIONS: Activations = "fast"


def resolve_isa(isa: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    """The instruction set to compute with: `isa`, else SMOLRUN_ISA, else the fastest there is.

    ResourceError where the name is unknown or this CPU does not run it.
    """
    environ = os.environ if environ is None else environ
    wanted = isa or environ.get("SMOLRUN_ISA") or _core.default_isa()
    supported = _core.isas()
    if wanted in supported:
        return wanted
    where = "isa" if isa else "SMOLRUN_ISA"
    raise ResourceError(
        f"{where} is {wanted!r}; this CPU runs {', '.join(supported)}. "
        f"Take one of these, or leave {where} away for the fastest"
    )


def build_runner(
    program: Program,
    weights: Mapping[str, _core.Weight | npt.NDArray[np.float32]],
    *,
    kv_blocks: int,
    threads: int,
    isa: str | None = None,
    activations: Activations = "exact",
    max_step_tokens: int = 256,
) -> _core.Runner:
    """A runner for `program`, with a KV cache of `kv_blocks` blocks of 32 tokens.

    Memory for the cache is taken from the system only as it is used. ResourceError where the
    system refuses it, or for `isa` as in `resolve_isa`; ValueError naming the operation where a
    weight does not fit.
    """
    config = program.config
    inverse_frequencies, attention_factor = config.rope_parameters()
    try:
        return _core.Runner(
            [operation.as_dict() for operation in program.operations],
            dict(weights),
            dict(program.buffers),
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            num_hidden_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            inverse_frequencies=inverse_frequencies,
            attention_factor=attention_factor,
            kv_blocks=kv_blocks,
            max_step_tokens=max_step_tokens,
            threads=threads,
            isa=resolve_isa(isa),
            activations=activations,
        )
    except MemoryError as error:
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(
            f"the system refuses the memory of a KV cache of {kv_blocks * BLOCK_TOKENS} tokens "
            f"({kv_blocks * BLOCK_TOKENS * config.kv_bytes_per_token / 2**20:.0f} MiB); "
            "ask for a smaller context"
        ) from None
