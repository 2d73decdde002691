"""The weight types: their names, their ids in GGUF, and the size of their blocks."""

from __future__ import annotations

from enum import Enum


class WeightType(str, Enum):
    """How the numbers of a weight are stored. The value is the name that GGUF tools print.

    A row is a whole number of blocks; a block never crosses rows.
    Sizes and ids: the GGUF specification.
    """

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"

    @property
    def ggml_id(self) -> int:
        """The id of the type in a GGUF tensor entry."""
        return _LAYOUT[self][0]

    @property
    def block_weights(self) -> int:
        """Weights in one block."""
        return _LAYOUT[self][1]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _LAYOUT[self][2]

    @property
    def is_float(self) -> bool:
        """Whether each weight stands alone (F32, F16, BF16)."""
        return self.block_weights == 1

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes, scales included."""
        return 8.0 * self.block_bytes / self.block_weights

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; ValueError if blocks do not fill it."""
        blocks, rest = divmod(columns, self.block_weights)
        if rest:
            raise ValueError(
                f"a row of {columns} weights is not a multiple of the {self.block_weights} "
                f"weights in a {self.value} block"
            )
        return blocks * self.block_bytes

    @classmethod
    def from_ggml_id(cls, ggml_id: int) -> WeightType | None:
        """The type of a GGUF id, or None for one that smolrun does not run."""
        return _BY_ID.get(ggml_id)


# type: (GGUF id, weights in a block, bytes of a block)
_LAYOUT: dict[WeightType, tuple[int, int, int]] = {
    WeightType.F32: (0, 1, 4),
    WeightType.F16: (1, 1, 2),
    WeightType.BF16: (30, 1, 2),
    WeightType.Q4_0: (2, 32, 18),
    WeightType.Q4_1: (3, 32, 20),
    WeightType.Q5_0: (6, 32, 22),
    WeightType.Q5_1: (7, 32, 24),
    WeightType.Q8_0: (8, 32, 34),
    WeightType.Q2_K: (10, 256, 84),
    WeightType.Q3_K: (11, 256, 110),
    WeightType.Q4_K: (12, 256, 144),
    WeightType.Q5_K: (13, 256, 176),
    WeightType.Q6_K: (14, 256, 210),
    WeightType.IQ4_NL: (20, 32, 18),
    WeightType.IQ4_XS: (23, 256, 136),
}

_BY_ID = {layout[0]: weight_type for weight_type, layout in _LAYOUT.items()}
