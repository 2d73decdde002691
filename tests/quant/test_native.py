"""The native quantizers, against the gguf package and against the definition of the blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
from gguf.quants import quantize as gguf_quantize

from smolrun import _core
from smolrun.quant.blocks import Floats, dequantize
from smolrun.quant.native import quantize
from smolrun.quant.types import WeightType
from tests.quant.rows import COLUMNS, importance, named_rows

ROWS = named_rows()
PLAIN = [WeightType(name) for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16")]
BLOCKS = [t for t in WeightType if not t.is_float]


def rows_as(values: Floats, weight_type: WeightType, **options: object) -> np.ndarray:
    data = np.ascontiguousarray(values).view(np.uint8)
    return quantize(data, WeightType.F32, values.shape[1], weight_type, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight_type", PLAIN)
@pytest.mark.parametrize("name", ROWS)
def test_the_bytes_of_gguf(weight_type: WeightType, name: str) -> None:
    values = ROWS[name]
    expected = gguf_quantize(values, gguf.GGMLQuantizationType[weight_type.value])
    np.testing.assert_array_equal(
        rows_as(values, weight_type), expected.reshape(len(values), -1).view(np.uint8)
    )


@pytest.mark.parametrize("weight_type", BLOCKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_instruction_sets_agree(weight_type: WeightType, weighted: bool) -> None:
    values = np.concatenate(list(ROWS.values()))
    weights = importance() if weighted else None
    expected = rows_as(values, weight_type, isa="scalar", importance=weights)
    for isa in _core.isas()[1:]:
        found = rows_as(values, weight_type, isa=isa, importance=weights)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("weight_type", BLOCKS)
def test_a_row_does_not_depend_on_its_neighbours(weight_type: WeightType) -> None:
    values = np.concatenate(list(ROWS.values()))
    whole = rows_as(values, weight_type, importance=importance())
    with ThreadPoolExecutor(3) as pool:
        parts = pool.map(
            lambda row: rows_as(values[row : row + 1], weight_type, importance=importance()),
            range(len(values)),
        )
        np.testing.assert_array_equal(np.concatenate(list(parts)), whole)


@pytest.mark.parametrize("weight_type", BLOCKS)
def test_error_is_that_of_a_uniform_quantizer_at_most(weight_type: WeightType) -> None:
    # Of uniform weights, steps of (range / codes) leave a variance of steps^2 / 12.
    codes = {"Q2": 4, "Q3": 8, "Q4": 16, "Q5": 32, "Q6": 64, "Q8": 256, "IQ": 12}
    values = ROWS["uniform"]
    error = dequantize(rows_as(values, weight_type), weight_type, COLUMNS) - values
    assert np.mean(error**2) < 1.1 * (2 / codes[weight_type.value[:2]]) ** 2 / 12


@pytest.mark.parametrize("weight_type", BLOCKS)
def test_importance_moves_the_error(weight_type: WeightType) -> None:
    if weight_type is WeightType.Q8_0:
        pytest.skip("made alike by everyone")
    values, weights = ROWS["normal"], importance()
    errors = [
        (weights * (dequantize(data, weight_type, COLUMNS) - values) ** 2).sum()
        for data in (
            rows_as(values, weight_type),
            rows_as(values, weight_type, importance=weights),
        )
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("weight_type", [WeightType.Q2_K, WeightType.Q3_K])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_few_codes_do_not_shrink(weight_type: WeightType, weighted: bool) -> None:
    weights = importance() if weighted else np.ones(COLUMNS, np.float32)
    values = ROWS["normal"]
    data = rows_as(values, weight_type, importance=weights if weighted else None)
    kept = weights * values * dequantize(data, weight_type, COLUMNS)
    whole = weights * values**2
    share = kept.reshape(-1, 256).sum(1) / whole.reshape(-1, 256).sum(1)
    if weighted and weight_type is WeightType.Q3_K:  # by half, for the sake of the error
        assert 0.975 < share.mean() < 0.995
    else:  # but for the rounding of two scales
        np.testing.assert_allclose(share, 1, atol=2e-3)


@pytest.mark.parametrize("weight_type", [WeightType.Q4_1, WeightType.Q5_1])
def test_importance_keeps_a_grid(weight_type: WeightType) -> None:
    # Blocks that were of the type and were stored as float16 since.
    grid = dequantize(rows_as(ROWS["normal"], weight_type), weight_type, COLUMNS)
    values = grid.astype(np.float16).astype(np.float32)
    for_all = np.ones(COLUMNS, np.float32)
    found = dequantize(rows_as(values, weight_type, importance=for_all), weight_type, COLUMNS)
    same = (found == grid).reshape(-1, 32).all(axis=1)
    assert same.mean() > 0.99


@pytest.mark.parametrize("weight_type", BLOCKS)
def test_zeros_stay_zeros(weight_type: WeightType) -> None:
    for weights in (None, importance(), np.zeros(COLUMNS, np.float32)):
        data = rows_as(ROWS["zeros"], weight_type, importance=weights)
        assert not dequantize(data, weight_type, COLUMNS).any()


@pytest.mark.parametrize("weight_type", BLOCKS)
def test_columns_without_importance_stay_finite(weight_type: WeightType) -> None:
    weights = importance()
    weights[: COLUMNS // 2] = 0
    data = rows_as(ROWS["normal"], weight_type, importance=weights)
    assert np.isfinite(dequantize(data, weight_type, COLUMNS)).all()


@pytest.mark.parametrize("source_type", [WeightType.F16, WeightType.BF16, WeightType.Q4_1])
def test_sources_of_other_types(source_type: WeightType) -> None:
    data = rows_as(ROWS["normal"], source_type)
    values = dequantize(data, source_type, COLUMNS)
    expected = rows_as(values, WeightType.Q4_K)
    found = quantize(data, source_type, COLUMNS, WeightType.Q4_K)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("weight_type", list(WeightType))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(weight_type: WeightType, bad: float) -> None:
    values = ROWS["normal"].copy()
    values[17, 300] = bad
    with pytest.raises(ValueError, match="row 17, column 300: not a finite number"):
        rows_as(values, weight_type)


@pytest.mark.parametrize("weight_type", [t for t in WeightType if t.value not in ("F32", "BF16")])
def test_weights_too_large_for_a_scale(weight_type: WeightType) -> None:
    with pytest.raises(ValueError, match=f"too large for {weight_type.value}"):
        rows_as(ROWS["normal"] * np.float32(1e20), weight_type)


def test_wrong_arguments() -> None:
    values = ROWS["normal"]
    with pytest.raises(ValueError, match="importance: must be finite and not negative"):
        rows_as(values, WeightType.Q4_K, importance=-importance())
    with pytest.raises(ValueError, match="shape"):
        rows_as(values, WeightType.Q4_K, importance=importance()[1:])
    with pytest.raises(ValueError, match="not a multiple of the 256"):
        rows_as(values[:, :32], WeightType.Q4_K)
    with pytest.raises(ValueError, match="this CPU runs"):
        rows_as(values, WeightType.Q4_K, isa="none")
    out = np.empty((1, 34), np.uint8)
    for source_type, columns, match in [("Q4_0", 18, "float type"), ("F32", 130, "whole blocks")]:
        with pytest.raises(ValueError, match=match):
            _core.quantize(
                "scalar", "Q8_0", source_type, np.zeros((1, columns), np.uint8), None, out
            )
