"""Rows on which quantizers are tried."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

COLUMNS = 768  # three blocks of 256: a tile that is not full


def named_rows() -> dict[str, Floats]:
    """Rows of COLUMNS weights, as models have them and as they could."""
    random = np.random.default_rng(7)
    normal = random.standard_normal((24, COLUMNS)).astype(np.float32)
    outliers = np.where(random.random((16, COLUMNS)) < 0.01, 0.6, 0.02).astype(np.float32)
    one_hot = np.zeros((8, COLUMNS), np.float32)
    one_hot[np.arange(8), random.integers(0, COLUMNS, 8)] = [1, -1, 0.3, -7, 1e-3, -1e-3, 40, -0.5]
    return {
        "normal": 0.03 * normal,
        "heavy tails": (0.02 * random.standard_t(3, (24, COLUMNS))).astype(np.float32),
        "uniform": random.uniform(-1, 1, (16, COLUMNS)).astype(np.float32),
        "outliers": outliers * normal[:16],
        "zeros": np.zeros((4, COLUMNS), np.float32),
        "one hot": one_hot,
        "constant": np.repeat(np.array([[0.5], [-0.5]], np.float32), COLUMNS, axis=1),
        "one sign": np.abs(normal[:8]) + 0.1,
        "ramp": np.linspace(-1, 1, 8 * COLUMNS, dtype=np.float32).reshape(8, COLUMNS),
        "few values": random.choice([-1, -0.5, 0, 1], (8, COLUMNS)).astype(np.float32),
        "scales from row to row": normal[:16] * np.logspace(-4, 3, 16, dtype=np.float32)[:, None],
        "scales in a row": normal[:16] * np.logspace(-3, 1, COLUMNS, dtype=np.float32),
        "huge": normal[:8] * np.float32(1e4),
        "tiny": normal[:8] * np.float32(1e-6),
        "very tiny": normal[:8] * np.float32(1e-9),
    }


def importance() -> Floats:
    """Of COLUMNS columns, over five orders of magnitude."""
    random = np.random.default_rng(8)
    return np.exp(random.normal(0, 2, COLUMNS)).astype(np.float32)
