"""The kernels that work on one vector: rounding of inputs, norm, rotation, activation, storing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.helpers import (
    Floats,
    assert_same_bits,
    each_isa,
    kernels,
    nmse,
    random_inputs,
    unaligned_floats,
)

# Multiples of 32 are what models have; the others end in every kind of tail.
LENGTHS = (1, 2, 7, 15, 17, 31, 32, 33, 48, 64, 96, 100, 255, 576, 960, 2048)


def quantize(isa: str, x: Floats) -> tuple[np.ndarray, Floats, np.ndarray]:
    """Codes in the order of the weights, scales, sums."""
    codes = np.full(x.size, 77, dtype=np.int16)
    scales = np.full(x.size // 32, np.nan, dtype=np.float32)
    sums = np.full(x.size // 16, 77, dtype=np.int32)
    kernels.quantize(isa, x, codes, scales, sums)
    return codes.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1), scales, sums


def check_quantized(isa: str, x: Floats) -> None:
    codes, scales, sums = quantize(isa, x)
    wide = codes.astype(np.int64)
    np.testing.assert_array_equal(sums, wide.reshape(-1, 16).sum(axis=1))
    assert np.abs(wide).max() <= 32767
    x64 = x.astype(np.float64)
    steps = np.repeat(scales.astype(np.float64), 32)
    # Half a step, and what float can not tell apart at the largest code (32767 * 2^-23).
    assert (np.abs(wide * steps - x64) <= steps * 0.51 + 3.9e-34).all()
    largest = np.abs(x64).reshape(-1, 32).max(axis=1)
    used = scales > 0
    np.testing.assert_allclose(scales[used] * 32767.0, largest[used], rtol=1e-6)
    assert (largest[~used] < 4e-34).all()


@each_isa
def test_quantize(isa: str) -> None:
    for columns in (32, 64, 96, 256, 576, 960, 2048):
        x = random_inputs(1, columns)[0]
        check_quantized(isa, x)
        check_quantized(isa, unaligned_floats(x))
        for factor in (1e-45, 1e-40, 1e-36, 1e-34, 1e-30, 1e30, 5e37):
            check_quantized(isa, (x * factor).astype(np.float32))
    uneven = random_inputs(1, 960)[0] * 10.0 ** (np.arange(960) // 32 - 15)
    check_quantized(isa, uneven.astype(np.float32))


@each_isa
def test_quantize_rounds_to_nearest_even(isa: str) -> None:
    x = np.zeros(64, dtype=np.float32)
    x[:8] = [32767, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 100.49]
    x[63] = -32767
    codes, scales, sums = quantize(isa, x)
    np.testing.assert_array_equal(codes[:8], [32767, 0, 2, 2, 0, -2, -2, 100])
    np.testing.assert_array_equal(scales, [1, 1])
    np.testing.assert_array_equal(sums, [32767 + 4 - 4 + 100, 0, 0, -32767])


@each_isa
def test_quantize_zero_blocks(isa: str) -> None:
    x = np.zeros(96, dtype=np.float32)
    x[:32] = -0.0
    x[40] = 3
    x[64:] = 1e-40
    codes, scales, sums = quantize(isa, x)
    assert np.flatnonzero(codes).tolist() == [40]
    assert scales[0] == scales[2] == 0
    assert sums.tolist() == [0, 0, 32767, 0, 0, 0]


@each_isa
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_quantize_marks_the_block_that_is_not_finite(isa: str, value: float) -> None:
    for place in range(32, 64):
        x = random_inputs(1, 96)[0]
        x[place] = value
        scales = quantize(isa, x)[1]
        np.testing.assert_array_equal(np.isnan(scales), [False, True, False])


def rms_norm(isa: str, x: Floats, weight: Floats, epsilon: float) -> Floats:
    out = np.full_like(x, 77)
    kernels.rms_norm(isa, x, weight, epsilon, out)
    return out


def check_close(found: Floats, expected: np.ndarray, limit: float = 2.5e-7) -> None:
    """Three roundings of the largest value at most, and less on the whole."""
    assert np.isfinite(found).all()
    largest = np.abs(expected).max()
    assert np.abs(found - expected).max() <= limit * largest
    if largest:
        assert nmse(found / largest, expected / largest) <= 2e-14


@each_isa
def test_rms_norm(isa: str) -> None:
    for columns in LENGTHS:
        x, weight = random_inputs(2, columns)
        for factor in (1e-30, 1e-3, 1, 1e4, 1e25):
            scaled = (x * factor).astype(np.float32)
            wide = scaled.astype(np.float64)
            for epsilon in (1e-5, 1e-6):
                # The kernel is given epsilon as a float.
                mean = (wide**2).mean() + np.float64(np.float32(epsilon))
                expected = wide / np.sqrt(mean) * weight
                found = rms_norm(isa, scaled, weight, epsilon)
                check_close(found, expected)
                assert_same_bits(
                    rms_norm(isa, unaligned_floats(scaled), unaligned_floats(weight), epsilon),
                    found,
                )


@each_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rms_norm_of_what_is_not_finite(isa: str, value: float) -> None:
    for place in (0, 17, 95):
        x, weight = random_inputs(2, 96)
        x[place] = value
        assert not np.isfinite(rms_norm(isa, x, weight, 1e-5)[place])
    x, weight = random_inputs(2, 96)
    weight[5] = value
    assert not np.isfinite(rms_norm(isa, x, weight, 1e-5)[5])


@each_isa
def test_rope(isa: str) -> None:
    for head_dim in (2, 6, 16, 32, 48, 64, 80, 96, 128):
        for heads in (1, 3, 9):
            angles = np.random.default_rng(head_dim).uniform(0, 1e4, head_dim // 2)
            cosine = np.cos(angles).astype(np.float32)
            sine = np.sin(angles).astype(np.float32)
            x = random_inputs(heads, head_dim)
            first, second = np.split(x.astype(np.float64), 2, axis=1)
            expected = np.concatenate(
                [first * cosine - second * sine, second * cosine + first * sine], axis=1
            )
            found = unaligned_floats(x)
            kernels.rope(isa, found, unaligned_floats(cosine), unaligned_floats(sine))
            check_close(found, expected)
            for head in range(heads):
                alone = x[head : head + 1].copy()
                kernels.rope(isa, alone, cosine, sine)
                assert_same_bits(alone[0], found[head].copy())
            x[0, 1] = np.nan
            kernels.rope(isa, x, cosine, sine)
            assert np.isnan(x).sum() == 2


def swiglu(isa: str, gate: Floats, up: Floats) -> Floats:
    out = np.full_like(gate, 77)
    kernels.swiglu(isa, gate, up, out)
    return out


def expected_swiglu(gate: Floats, up: Floats) -> np.ndarray:
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(wide / (1 + np.exp(-wide)) * up)


@each_isa
def test_swiglu(isa: str) -> None:
    for columns in LENGTHS:
        gate, up = random_inputs(2, columns) * np.float32(5)
        found = swiglu(isa, gate, up)
        check_close(found, expected_swiglu(gate, up))
        assert_same_bits(swiglu(isa, unaligned_floats(gate), unaligned_floats(up)), found)


@each_isa
def test_swiglu_at_every_size_of_gate(isa: str) -> None:
    # Each value to within a few roundings of itself, down to where it is too small to matter.
    gate = np.concatenate(
        [
            np.linspace(-87, 87, 20001),
            np.linspace(-1, 1, 2001),
            [0.0, -0.0, 1e-40, 1e30, -1e30, 88.8, -88.8, -90, -104, -120, 120, 3e38, -3e38],
        ]
    ).astype(np.float32)
    found = swiglu(isa, gate, np.ones_like(gate))
    expected = expected_swiglu(gate, np.ones_like(gate))
    assert np.isfinite(found).all()
    assert (np.abs(found - expected) <= 6e-7 * np.abs(expected) + 2e-36).all()


@each_isa
def test_swiglu_of_what_is_not_finite(isa: str) -> None:
    for place in range(33):
        for value in (np.nan, np.inf, -np.inf):
            gate, up = random_inputs(2, 33)
            gate[place] = value
            found = swiglu(isa, gate, up)
            assert np.flatnonzero(~np.isfinite(found)).tolist() == [place]
            gate, up = random_inputs(2, 33)
            up[place] = value
            found = swiglu(isa, gate, up)
            assert np.flatnonzero(~np.isfinite(found)).tolist() == [place]


@each_isa
def test_add(isa: str) -> None:
    for columns in LENGTHS:
        x, y = random_inputs(2, columns)
        x[0] = np.nan
        found = unaligned_floats(y)
        kernels.add(isa, unaligned_floats(x), found)
        np.testing.assert_array_equal(found, x + y)


class Stored:
    """Codes and scales of a K and a V, stored in an otherwise untouched block."""

    def __init__(self, isa: str, k: Floats, v: Floats, slot: int) -> None:
        head_dim = k.size
        k_block, v_block = (np.full(32 * (head_dim + 2), 0x2BCD, np.int16) for _ in range(2))
        kernels.store_kv(isa, unaligned_floats(k), unaligned_floats(v), slot, k_block, v_block)
        k_codes = k_block[: 32 * head_dim].reshape(head_dim // 2, 32, 2)
        v_codes = v_block[: 32 * head_dim].reshape(16, head_dim, 2)
        scales = [block[32 * head_dim :].view(np.float32) for block in (k_block, v_block)]
        self.k = k_codes[:, slot].reshape(-1).astype(np.int64)
        self.v = v_codes[slot // 2, :, slot % 2].astype(np.int64)
        self.k_scale, self.v_scale = (float(scale[slot]) for scale in scales)
        k_codes[:, slot] = v_codes[slot // 2, :, slot % 2] = 0x2BCD
        for scale in scales:
            scale.view(np.int32)[slot] = 0x2BCD2BCD
        assert (k_block == 0x2BCD).all()
        assert (v_block == 0x2BCD).all()


@each_isa
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_store_kv_rounds_to_the_nearest_code(isa: str, size: float) -> None:
    for head_dim in (2, 6, 32, 48, 64, 80, 96, 128, 1024):
        for slot in (0, 1, 31):
            k, v = random_inputs(2, head_dim, seed=slot) * np.float32(size)
            found = Stored(isa, k, v, slot)
            k_scale = max(np.abs(k).max() / 32767, np.linalg.norm(k.astype(np.float64)) / 46300)
            assert found.k_scale == pytest.approx(k_scale, rel=1e-6)
            assert found.v_scale == pytest.approx(np.abs(v).max() / 32767, rel=1e-6)
            # Half a code, and what a code times a float scale is off by.
            assert np.abs(found.k * found.k_scale - k).max() <= 0.504 * found.k_scale
            assert np.abs(found.v * found.v_scale - v).max() <= 0.504 * found.v_scale


@each_isa
def test_products_of_stored_vectors_fit_32_bits(isa: str) -> None:
    for head_dim in (2, 6, 64, 128, 1024):
        ones = np.ones(head_dim, dtype=np.float32)
        first, pair = ones * 0, ones * 0
        first[0] = pair[:2] = 1
        # Codes of x.5 that all round up.
        halves = ones * np.float32(np.sqrt(head_dim) * 0.5)
        for x in (ones, first, pair, halves, *random_inputs(20, head_dim)):
            codes = Stored(isa, x, x, 3).k
            assert np.abs(codes).max() <= 32767
            assert 1e9 < codes @ codes < 2**31


@each_isa
def test_store_kv_of_what_has_no_scale(isa: str) -> None:
    for head_dim in (2, 6, 64, 80):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            x = random_inputs(1, head_dim)[0]
            x[1] = value
            found = Stored(isa, x, -x, 1)
            assert not found.k.any()
            assert not found.v.any()
            assert np.isnan([found.k_scale, found.v_scale]).all()
        for value in (0.0, 1e-35, 1e-45):
            x = np.full(head_dim, value, dtype=np.float32)
            found = Stored(isa, x, -x, 1)
            assert not found.k.any()
            assert not found.v.any()
            assert found.k_scale == found.v_scale == 0
