"""The reference reading of a listing: plain NumPy, slow on purpose, the oracle of the native one.

It computes in float64 unless asked otherwise, on float32 weights: what a test then measures is the
native reading's rounding, not the sum of two roundings. Only what transformers rounds to float32
by definition, the inverse frequencies of RoPE and their product with the position, is rounded here
too, because at large angles that rounding is part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun.model.program import (
    Attention,
    Embed,
    LinearAdd,
    NormLogits,
    NormQKV,
    NormSwiGLU,
    Program,
)

Array = npt.NDArray[Any]  # of the runner's dtype
Indices = npt.NDArray[np.int64]

# Queries that attend at a time, to bound the memory of the scores.
_QUERY_ROWS = 256


class ReferenceRunner:
    """Runs a listing with its own KV cache, one growing array per sequence and layer.

    dtype: float64, or float32 to be faster. rounded_kv: K and V are rounded when stored, as in the
    native cache.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, npt.NDArray[np.float32]],  # canonical name -> values in its shape
        *,
        dtype: npt.DTypeLike = np.float64,
        rounded_kv: bool = False,
    ) -> None:
        for name, shape in program.weights.items():
            if weights[name].shape != shape:
                raise ValueError(f"weight {name} has shape {weights[name].shape}, needed: {shape}")
        self.program = program
        self.weights = weights
        self.dtype = np.dtype(dtype)
        self.rounded_kv = rounded_kv
        self._inverse_frequencies, self._attention_factor = program.config.rope_parameters()
        self._caches: dict[int, _Cache] = {}

    def clear(self) -> None:
        """Forgets every sequence."""
        self._caches.clear()

    def forward(self, input_ids: npt.ArrayLike, start_pos: int = 0) -> Array:
        """Logits (batch, n, vocab_size) of input_ids (batch, n) from position start_pos on."""
        ids = np.atleast_2d(np.asarray(input_ids, dtype=np.int64))
        batch, length = ids.shape
        positions = np.tile(np.arange(start_pos, start_pos + length), batch)
        logits = self.step(ids.reshape(-1), positions, np.repeat(np.arange(batch), length))
        return logits.reshape(batch, length, self.program.config.vocab_size)

    def step(
        self,
        tokens: npt.ArrayLike,  # (n,)
        positions: npt.ArrayLike,  # (n,), consecutive within a sequence, no gap to what is cached
        sequences: npt.ArrayLike,  # (n,), which sequence each token belongs to
        logit_rows: npt.ArrayLike | None = None,  # (r,) rows of the step; None: all
    ) -> Array:
        """Logits (r, vocab_size) of one step.

        K and V of all tokens are stored before any attention reads them; a token sees the positions
        0 up to its own. A position that was cached before is written over, and what came after it
        is forgotten. ValueError for a token outside the vocabulary or a gap between positions.
        """
        token_ids, places, owners = (
            np.asarray(values, dtype=np.int64).reshape(-1)
            for values in (tokens, positions, sequences)
        )
        if not len(token_ids) == len(places) == len(owners):
            raise ValueError("tokens, positions and sequences differ in length")
        if np.any((token_ids < 0) | (token_ids >= self.program.config.vocab_size)):
            raise ValueError("a token id lies outside the vocabulary")
        rows_of = {int(owner): np.flatnonzero(owners == owner) for owner in np.unique(owners)}
        for owner, rows in rows_of.items():
            cache = self._caches.setdefault(owner, _Cache(self.program, self.dtype))
            cache.reserve(places[rows])
        cosine, sine = self._rotation(places)
        wanted = slice(None) if logit_rows is None else np.asarray(logit_rows, dtype=np.int64)
        buffers: dict[str, Array] = {}
        logits = np.empty((0, self.program.config.vocab_size), dtype=self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for operation in self.program.operations:
                if isinstance(operation, Embed):
                    embedded = self.weights[operation.weight][token_ids]
                    buffers[operation.out] = embedded.astype(self.dtype)
                elif isinstance(operation, NormQKV):
                    query, key, value = self._norm_qkv(operation, buffers, cosine, sine)
                    if self.rounded_kv:
                        key, value = rounded_keys(key), rounded_values(value)
                    buffers[operation.out] = query
                    for owner, rows in rows_of.items():
                        self._caches[owner].store(
                            operation.layer, places[rows], key[rows], value[rows]
                        )
                elif isinstance(operation, Attention):
                    query = buffers[operation.input]
                    out = np.empty_like(query)
                    for owner, rows in rows_of.items():
                        keys, values = self._caches[owner].read(operation.layer)
                        out[rows] = self._attention(query[rows], places[rows], keys, values)
                    buffers[operation.out] = out
                elif isinstance(operation, LinearAdd):
                    product = self._linear(
                        buffers[operation.input], operation.weight, operation.bias
                    )
                    buffers[operation.out] = buffers[operation.out] + product
                elif isinstance(operation, NormSwiGLU):
                    normed = self._norm(buffers, operation)
                    gate = self._linear(normed, operation.gate, operation.gate_bias)
                    up = self._linear(normed, operation.up, operation.up_bias)
                    buffers[operation.out] = gate / (1.0 + np.exp(-gate)) * up
                elif isinstance(operation, NormLogits):
                    buffers[operation.input] = buffers[operation.input][wanted]
                    normed = self._norm(buffers, operation)
                    logits = self._linear(normed, operation.weight, None)
                    self.hidden = normed
                else:
                    raise ValueError(f"no reading of operation {operation.kind}")
        return logits

    def _norm_qkv(
        self, operation: NormQKV, buffers: dict[str, Array], cosine: Array, sine: Array
    ) -> tuple[Array, Array, Array]:
        """Queries (n, heads * head_dim); keys and values (n, kv_heads, head_dim)."""
        normed = self._norm(buffers, operation)
        heads = [
            self._linear(normed, weight, bias).reshape(
                len(normed), -1, self.program.config.head_dim
            )
            for weight, bias in (
                (operation.q, operation.q_bias),
                (operation.k, operation.k_bias),
                (operation.v, operation.v_bias),
            )
        ]
        query, key, value = heads
        if operation.rope:
            query, key = _rotated(query, cosine, sine), _rotated(key, cosine, sine)
        return query.reshape(len(normed), -1), key, value

    def _attention(self, query: Array, places: Indices, keys: Array, values: Array) -> Array:
        """query (n, heads * head_dim), keys and values (length, kv_heads, head_dim)."""
        config = self.program.config
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        out = np.empty_like(query)
        keys_t = keys.transpose(1, 2, 0)[:, None]  # (kv_heads, 1, head_dim, length)
        values_t = values.transpose(1, 0, 2)[:, None]  # (kv_heads, 1, length, head_dim)
        for begin in range(0, len(query), _QUERY_ROWS):
            part = slice(begin, begin + _QUERY_ROWS)
            grouped = query[part].reshape(
                -1, kv_heads, config.num_attention_heads // kv_heads, head_dim
            )
            scores = grouped.transpose(1, 2, 0, 3) @ keys_t  # (kv_heads, group, n, length)
            scores *= 1.0 / np.sqrt(head_dim)
            hidden = np.arange(len(keys)) > places[part, None]  # (n, length)
            scores[:, :, hidden] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            mixed = weights @ values_t  # (kv_heads, group, n, head_dim)
            out[part] = mixed.transpose(2, 0, 1, 3).reshape(len(mixed[0, 0]), -1)
        return out

    def _norm(
        self, buffers: dict[str, Array], operation: NormQKV | NormSwiGLU | NormLogits
    ) -> Array:
        x = buffers[operation.input]
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        scaled = x / np.sqrt(mean_square + np.float32(operation.epsilon))
        normed: Array = scaled * self._weight(operation.norm)
        return normed

    def _linear(self, x: Array, weight: str, bias: str | None) -> Array:
        product: Array = x @ self._weight(weight).T
        return product if bias is None else product + self._weight(bias)

    def _weight(self, name: str) -> Array:
        return self.weights[name].astype(self.dtype, copy=False)

    def _rotation(self, places: Indices) -> tuple[Array, Array]:
        """Cosine and sine (n, 1, head_dim / 2) at the positions, magnitude factor included."""
        angles = places.astype(np.float32)[:, None] * self._inverse_frequencies
        wide = angles.astype(self.dtype)[:, None]
        return np.cos(wide) * self._attention_factor, np.sin(wide) * self._attention_factor


class _Cache:
    """K and V of one sequence."""

    def __init__(self, program: Program, dtype: np.dtype[Any]) -> None:
        config = program.config
        self._shape = (config.num_key_value_heads, config.head_dim)
        # per layer, (capacity, kv_heads, head_dim)
        empty = np.zeros((0, *self._shape), dtype=dtype)
        self._keys: list[Array] = [empty] * config.num_hidden_layers
        self._values: list[Array] = [empty] * config.num_hidden_layers
        self.length = 0

    def reserve(self, places: Indices) -> None:
        first, last = int(places[0]), int(places[-1])
        if not 0 <= first <= self.length or not np.array_equal(places, np.arange(first, last + 1)):
            raise ValueError(
                f"positions {places.tolist()} do not follow each other from at most {self.length}, "
                "the number of tokens cached"
            )
        self.length = last + 1

    def store(self, layer: int, places: Indices, key: Array, value: Array) -> None:
        for arrays, new in ((self._keys, key), (self._values, value)):
            if len(arrays[layer]) < self.length:
                grown = np.zeros((2 * self.length, *self._shape), dtype=arrays[layer].dtype)
                grown[: len(arrays[layer])] = arrays[layer]
                arrays[layer] = grown
            arrays[layer][places] = new

    def read(self, layer: int) -> tuple[Array, Array]:
        return self._keys[layer][: self.length], self._values[layer][: self.length]


def rounded_keys(keys: Array) -> Array:
    """Keys (..., head_dim) as the native cache holds them: codes of 16 bits and a scale for each.

    A product of two vectors of such codes fits 32 bits: |q . k| <= |q| |k|.
    """
    largest = np.abs(keys).max(axis=-1, keepdims=True) / 32767
    norm = np.sqrt(np.square(keys).sum(axis=-1, keepdims=True)) / 46300
    return _rounded(keys, np.maximum(largest, norm))


def rounded_values(values: Array) -> Array:
    """Values (..., head_dim) likewise: the largest of each gets the largest code."""
    return _rounded(values, np.abs(values).max(axis=-1, keepdims=True) / 32767)


def _rounded(vectors: Array, scale: Array) -> Array:
    return np.rint(vectors / np.where(scale == 0, 1, scale)) * scale


def _rotated(heads: Array, cosine: Array, sine: Array) -> Array:
    """Rotates halves i and i + head_dim/2 of heads (n, heads, head_dim)."""
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
