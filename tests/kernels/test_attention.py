"""Attention over the blocks of the KV cache, against float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from smolrun.model.reference import rounded_keys, rounded_values
from tests.kernels.helpers import Floats, assert_same_bits, each_isa, kernels, nmse, random_inputs

BLOCK_TOKENS = 32
# Codes, and as scales: NaN, 0, almost 0, almost the largest float.
NAN, POISONS = 0x7FFF, (0, -0x8000, 0x7F7F, -1)


def bound(isa: str) -> float:
    """NMSE that is allowed, of K and V as they are stored.

    Scalar: a few codes in a thousand are rounded the other way than in float64; a float score of
    size 10 is off by 1e-6, and so is its exponential. Vectors: q has 16
    bits, so a score is off by 6e-6 |q| |k|, up to 2e-4 here; of the weights of a block, which add
    up to 32767, each is rounded by 0.3, 3e-4 of it where all are the same.
    """
    return 1e-9 if isa == "scalar" else 2e-7


class Cache:
    """A pool of blocks in which one sequence is stored, in any order, among poisoned slots."""

    def __init__(self, k: Floats, v: Floats, *, seed: int = 0, poison: int = NAN) -> None:
        tokens, head_dim = k.shape
        blocks = -(-tokens // BLOCK_TOKENS)
        random = np.random.default_rng([seed, tokens])
        self.head_dim = head_dim
        # Two layers and heads of others stand before and behind this one.
        self.size = (head_dim + 2) * BLOCK_TOKENS
        self.k_offset = self.size
        self.v_offset = 3 * self.size
        self.stride = 5 * self.size
        self.pool = np.full((blocks + 3) * self.stride, poison, dtype=np.int16)
        self.table = random.permutation(blocks + 3)[:blocks].astype(np.int32)
        for token in range(tokens):
            k_block, v_block = self.blocks(int(self.table[token // BLOCK_TOKENS]))
            slot = token % BLOCK_TOKENS
            kernels.store_kv("scalar", k[token].copy(), v[token].copy(), slot, k_block, v_block)

    def blocks(self, block: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
        k_start = block * self.stride + self.k_offset
        v_start = block * self.stride + self.v_offset
        return (
            self.pool[k_start : k_start + self.size],
            self.pool[v_start : v_start + self.size],
        )

    def attention(
        self, isa: str, q: Floats, length: int, scale: float, *, by_segments: bool = False
    ) -> Floats:
        """q [group, d] of one token, or [tokens, group, d]: the last of them sees `length`."""
        queries = q.reshape(-1, *q.shape[-2:])
        out = np.full_like(queries, 77)
        kernels.attention(
            isa,
            queries,
            out,
            length - len(queries) + 1,
            scale,
            self.pool,
            self.table,
            self.stride,
            self.k_offset,
            self.v_offset,
            by_segments,
        )
        return out.reshape(q.shape)


def expected_attention(q: Floats, k: Floats, v: Floats, scale: float) -> npt.NDArray[np.float64]:
    """In float64, with k and v rounded as the cache has them."""
    k64, v64 = rounded_keys(k.astype(np.float64)), rounded_values(v.astype(np.float64))
    scores = q.astype(np.float64) @ k64.T * np.float64(np.float32(scale))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True) @ v64)


@each_isa
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 128])
def test_attention(isa: str, head_dim: int) -> None:
    k, v = random_inputs(2 * 200, head_dim).reshape(2, 200, head_dim)
    scale = head_dim**-0.5
    for group in range(1, 9):
        q = random_inputs(group, head_dim, seed=group) * np.float32(3)
        for length in (1, 2, 16, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200):
            cache = Cache(k[:length], v[:length])
            found = cache.attention(isa, q, length, scale)
            expected = expected_attention(q, k[:length], v[:length], scale)
            assert np.isfinite(found).all()
            assert nmse(found, expected) <= bound(isa), f"{group} heads, {length} tokens"


@each_isa
def test_every_length(isa: str) -> None:
    k, v = random_inputs(2 * 200, 64).reshape(2, 200, 64)
    q = random_inputs(3, 64)
    for length in range(1, 201):
        found = Cache(k[:length], v[:length]).attention(isa, q, length, 0.125)
        assert nmse(found, expected_attention(q, k[:length], v[:length], 0.125)) <= bound(isa)


@each_isa
def test_a_long_sequence(isa: str) -> None:
    k, v = random_inputs(2 * 4000, 64).reshape(2, 4000, 64)
    q = random_inputs(3, 64) * np.float32(4)
    found = Cache(k, v).attention(isa, q, 4000, 0.125)
    assert nmse(found, expected_attention(q, k, v, 0.125)) <= bound(isa)


@each_isa
@pytest.mark.parametrize("poison", POISONS)
def test_slots_past_the_length_and_the_place_of_blocks_change_no_bit(isa: str, poison: int) -> None:
    for head_dim in (48, 64, 128):
        k, v = random_inputs(2 * 70, head_dim).reshape(2, 70, head_dim)
        q = random_inputs(4, head_dim)
        for length in (1, 15, 31, 32, 33, 70):
            part = (k[:length], v[:length])
            found = Cache(*part).attention(isa, q, length, 0.125)
            other = Cache(*part, seed=9, poison=poison).attention(isa, q, length, 0.125)
            assert_same_bits(other, found)
            # Tokens that came later than this one are stored, and are not seen.
            assert_same_bits(Cache(k, v).attention(isa, q, length, 0.125), found)


@each_isa
def test_sharing_a_call_changes_no_bit(isa: str) -> None:
    for head_dim in (32, 48, 64, 96, 128):
        k, v = random_inputs(2 * 77, head_dim).reshape(2, 77, head_dim)
        cache = Cache(k, v)
        q = random_inputs(8, head_dim)
        alone = np.concatenate([cache.attention(isa, q[i : i + 1], 77, 0.2) for i in range(8)])
        for group in range(1, 9):
            assert_same_bits(cache.attention(isa, q[:group], 77, 0.2), alone[:group])


@each_isa
@pytest.mark.parametrize("group", [1, 3, 4, 5])
def test_tokens_that_share_a_call_get_the_bits_of_one_alone(isa: str, group: int) -> None:
    k, v = random_inputs(2 * 620, 48).reshape(2, 620, 48)
    cache = Cache(k, v)
    for last in (12, 32, 37, 64, 71, 256, 257, 263, 300, 513, 620):
        q = random_inputs(12 * group, 48, seed=last).reshape(12, group, 48)
        alone = [cache.attention(isa, q[i], last - 11 + i, 0.2) for i in range(12)]
        for tokens in (2, 3, 5, 8, 11, 12):
            found = cache.attention(isa, q[-tokens:], last, 0.2)
            assert_same_bits(found, np.stack(alone[-tokens:]))


@each_isa
def test_a_later_token_that_is_not_finite_does_not_reach_an_earlier_one(isa: str) -> None:
    k, v = random_inputs(2 * 300, 64).reshape(2, 300, 64)
    q = random_inputs(12 * 3, 64).reshape(12, 3, 64)
    clean = Cache(k, v).attention(isa, q, 300, 0.125)
    k[293] = v[293] = np.nan
    found = Cache(k, v).attention(isa, q, 300, 0.125)
    assert_same_bits(found[:5], clean[:5])
    assert np.isnan(found[5:]).all()


@each_isa
def test_segments_in_any_order_give_the_same_bits(isa: str) -> None:
    k, v = random_inputs(2 * 1100, 64).reshape(2, 1100, 64)
    cache = Cache(k, v)
    for group in (1, 3, 4, 15):
        q = random_inputs(group, 64, seed=group)
        for length in (1, 33, 255, 256, 257, 512, 700, 1100):
            found = cache.attention(isa, q, length, 0.125, by_segments=True)
            assert_same_bits(found, cache.attention(isa, q, length, 0.125))


@each_isa
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_huge_scores(isa: str, size: float) -> None:
    # The largest score takes all: its V comes out, and nothing overflows.
    random = np.random.default_rng(3)
    k = random.choice([-1.0, 1.0], (90, 64)).astype(np.float32)
    v = random_inputs(90, 64)
    q = (k[[3, 40, 89]] * size / 64).astype(np.float32)
    for sign in (1, -1):
        found = Cache(k, v).attention(isa, q * np.float32(sign), 90, 1.0)
        expected = expected_attention(q * np.float32(sign), k, v, 1.0)
        assert np.isfinite(found).all()
        assert nmse(found, expected) <= 1e-6


@each_isa
@pytest.mark.parametrize("step", [0.01, 0.08, 0.6, -0.2])
def test_scores_that_rise_from_token_to_token(isa: str, step: float) -> None:
    # Within a block by 0.3 to 20, from block to block likewise: below and above what the reference
    # of a softmax is raised for.
    k, v = random_inputs(2 * 300, 64).reshape(2, 300, 64)
    k[:, 0] = np.arange(300)
    q = random_inputs(3, 64) * np.float32(0.1)
    q[:, 0] = step
    found = Cache(k, v).attention(isa, q, 300, 1.0)
    assert nmse(found, expected_attention(q, k, v, 1.0)) <= bound(isa)


@each_isa
def test_rows_that_are_raised_change_no_bit_of_others(isa: str) -> None:
    k, v = random_inputs(2 * 300, 48).reshape(2, 300, 48)
    cache = Cache(k, v)
    q = random_inputs(12 * 3, 48, seed=4).reshape(12, 3, 48)
    q *= np.geomspace(0.1, 100, 36, dtype=np.float32).reshape(3, 12).T[:, :, None]
    alone = [cache.attention(isa, q[i], 289 + i, 0.2) for i in range(12)]
    assert_same_bits(cache.attention(isa, q, 300, 0.2), np.stack(alone))


@each_isa
def test_equal_scores_give_the_mean(isa: str) -> None:
    v = random_inputs(100, 64)
    k = np.zeros((100, 64), dtype=np.float32)
    for level in (0.0, 1e4, -1e4):
        k[:, 0] = level
        q = np.zeros((2, 64), dtype=np.float32)
        q[:, 0] = 1
        found = Cache(k, v).attention(isa, q, 100, 1.0)
        mean = rounded_values(v.astype(np.float64)).mean(axis=0)
        assert np.abs(found - mean).max() <= (1e-6 if isa == "scalar" else 1e-4)


@each_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_out(isa: str, value: float) -> None:
    k, v = random_inputs(2 * 70, 64).reshape(2, 70, 64)
    q = random_inputs(3, 64)
    clean = Cache(k, v).attention(isa, q, 70, 0.125)
    for token in (0, 31, 32, 69):
        broken = v.copy()
        broken[token, 5] = value
        found = Cache(k, broken).attention(isa, q, 70, 0.125)
        assert not np.isfinite(found[:, 5]).any()
        if np.isnan(value):
            broken = k.copy()
            broken[token, 5] = value
            assert np.isnan(Cache(broken, v).attention(isa, q, 70, 0.125)).all()
    broken_q = q.copy()
    broken_q[1, 7] = value
    found = Cache(k, v).attention(isa, broken_q, 70, 0.125)
    assert not np.isfinite(found[1]).any()
    assert_same_bits(found[[0, 2]], clean[[0, 2]])
