"""Rotary position embedding: the inverse frequencies of the default, linear and YaRN kinds.

The formulas, and what is rounded to float32, are those of transformers 5
(`modeling_rope_utils.py`), so that logits agree at any position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RopeType = Literal["default", "linear", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched past the context that a model was trained on."""

    type: RopeType = "default"
    factor: float = 1.0  # linear, yarn: new context / original context
    # yarn: tokens of context before stretching; 0 for the other types
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None: from the factor
    beta_fast: float = 32.0  # yarn: pairs that turn more often than this are left alone
    beta_slow: float = 1.0  # yarn: pairs that turn less often than this are stretched in full
    truncate: bool = True  # yarn: whether the bounds of the ramp are rounded to whole pairs
    mscale: float | None = None  # yarn: with mscale_all_dim, another way to the attention factor
    mscale_all_dim: float | None = None


def rope_parameters(
    theta: float, head_dim: int, scaling: RopeScaling
) -> tuple[npt.NDArray[np.float32], float]:
    """Inverse frequencies (head_dim / 2,) in radians per token, and the factor on cos and sin."""
    import numpy as np

    # The power is taken in float64 and rounded once: torch's float32 power is within one unit in
    # the last place of this on any machine, while NumPy's own float32 power varies with the CPU.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    inverse_frequencies = np.float32(1.0) / periods
    if scaling.type == "default":
        return inverse_frequencies, 1.0
    factor = np.float32(scaling.factor)
    if scaling.type == "linear":
        return inverse_frequencies / factor, 1.0
    low, high = _correction_range(theta, head_dim, scaling)
    if low == high:
        high += 0.001
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    kept = np.float32(1.0) - ramp  # (head_dim / 2,), share of the original frequency
    stretched = np.float32(1.0) / (factor * periods)
    blended = stretched * (np.float32(1.0) - kept) + inverse_frequencies * kept
    return blended.astype(np.float32), _attention_factor(scaling)


def _correction_range(theta: float, head_dim: int, scaling: RopeScaling) -> tuple[float, float]:
    """The pairs between which YaRN goes from the original to the stretched frequency."""

    def pair_of(turns: float) -> float:
        ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1.0 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
