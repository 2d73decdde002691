"""The types that fit a model into a size at the least loss, measured.

What a weight loses in a type is taken to be

    sensitivity of its group x importance-weighted squared error of the weight in the type

summed over weights: to second order the divergence is quadratic in the errors, and those of
different weights have nothing to do with each other. The errors are those of the very bytes that
would be written; a group's sensitivity is the KL divergence of the model with only that group
quantized, measured on a text, over the group's error. An exact knapsack then chooses.

Where a named mix that fits is predicted to lose nearly as little, both are measured whole, and the
mix is taken unless the other choice is clearly the better one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun.engine.machine import choose_threads
from smolrun.engine.native import BLOCK_TOKENS, build_runner
from smolrun.errors import OutputError, RequestError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.convert import Progress
from smolrun.files.gguf import DEFAULT_ALIGNMENT, padded
from smolrun.files.gguf_names import gguf_name
from smolrun.files.imatrix import ImportanceMatrix
from smolrun.files.output import check_output
from smolrun.files.quantize import Quantized, default_target, quantize_files
from smolrun.files.weights import NativeWeights, WeightLoading, weight_of
from smolrun.measure.divergence import Estimate, Values, kl_divergence
from smolrun.measure.importance import SummingRunner, multiplied
from smolrun.measure.text import tokens_of
from smolrun.model.llama import build
from smolrun.model.program import Program
from smolrun.quant.blocks import dequantize
from smolrun.quant.knapsack import cheapest
from smolrun.quant.mixes import MIXES, Mix, choose_types, fitting
from smolrun.quant.native import quantize
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

TOKENS = 512  # that are read from an empty cache
IMPORTANCE_TOKENS = 4096
_TRIAL_TOKENS = 2 * TOKENS  # that whole choices are measured on: the last ones of those above
# Losses found are up to twice those predicted (docs/decisions.md): a mix beyond can not be better.
_NEAR = 2.0
# In standard errors: by how much a choice must be better than a mix to be taken.
_CLEAR = 2.0
_ROWS = 128  # tokens of a step

# What a weight may become, where its blocks fill the rows.
_CHOICES = [
    WeightType(name)
    for name in (
        "Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K",
        "Q8_0", "BF16",
    )
]  # fmt: skip
# What sensitivities are measured with: a loss that is well above rounding and still small.
_PROBE = WeightType.Q4_K
_PARTS = 6  # layers are measured in so many parts
_LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)\.weight")


_FIT = Mix("FIT", WeightType.Q4_K, 15)  # what files say; the base is that of most weights

# Room for what the metadata says of a quantization.
_METADATA_BYTES = 1024


@dataclass(frozen=True)
class Size:
    """How large a file may be: one of the two."""

    nbytes: int = 0  # of the file
    bits_per_weight: float | None = None  # of all weights, scales and vectors included

    def holds(self, made: Quantized) -> bool:
        """Whether a file is that small."""
        if self.bits_per_weight is not None:
            return made.bits_per_weight <= self.bits_per_weight
        return made.nbytes <= self.nbytes

    @classmethod
    def parse(cls, text: str) -> Size:
        """Of "80MB", "1.9 GB", "4.5bpw" or a number of bytes; ValueError for anything else."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
        if found is not None and found[2] == "bpw":
            return cls(bits_per_weight=float(found[1]))
        if found is None or found[2] not in _UNITS:
            raise ValueError(f"expected a size such as 80MB, 1.9GB or 4.5bpw, found {text!r}")
        return cls(int(float(found[1]) * _UNITS[found[2]]))


_UNITS = {
    "": 1, "b": 1, "bytes": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20,
    "gib": 2**30,
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """Types for all matrices of a model."""

    types: dict[str, WeightType]  # by GGUF name
    predicted_kl: float  # on the text, if losses add up as assumed
    importance: ImportanceMatrix | None  # of the text; None: a mix that is made without
    mix: Mix | None = None  # that these types are of


class Fitting:
    """What each matrix of a model may become, how large that is, and once measured, what it loses.

    Args:
        checkpoint: the model, better one that is not quantized.

    Raises:
        ModelFormatError, UnsupportedError: as `build`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._program = build(checkpoint.config)
        shapes = self._program.weights
        self._matrices = {name: checkpoint.tensors[name] for name in shapes if shapes[name][1:]}
        self._choices = {
            name: [t for t in _CHOICES if tensor.columns % t.block_weights == 0]
            or [WeightType.BF16]
            for name, tensor in self._matrices.items()
        }
        self._sizes = {
            name: [
                padded(tensor.rows * t.row_bytes(tensor.columns), DEFAULT_ALIGNMENT)
                for t in self._choices[name]
            ]
            for name, tensor in self._matrices.items()
        }
        vectors = [shape for shape in shapes.values() if not shape[1:]]
        self._vectors = sum(padded(4 * shape[0], DEFAULT_ALIGNMENT) for shape in vectors)
        config = checkpoint.config
        self._query_group = config.num_attention_heads // config.num_key_value_heads
        self._costs: dict[str, list[float]] = {}
        self._importance = ImportanceMatrix({}, {})
        self._tokens = np.empty(0, np.int32)

    def check(self, room: int) -> None:
        """Raise RequestError where tensors do not fit into so many bytes, whatever their types."""
        smallest = sum(map(min, self._sizes.values()))
        if smallest + self._vectors > room:
            raise RequestError(
                f"the model does not fit: its matrices take {smallest} bytes at least, and "
                f"{max(room - self._vectors, 0)} are left for them; make SIZE "
                f"{smallest + self._vectors - room} bytes larger"
            )

    def measure(
        self,
        text: Sequence[int],
        *,
        threads: int,
        importance: ImportanceMatrix | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Measure what each matrix loses in each type.

        Args:
            text: tokens; the importance of columns is measured on the first 4096, divergence on
                the first 512 of them, that of whole choices on the last 1024.
            threads: to compute with.
            importance: of columns; None: measured.
            progress: told the models measured and all.

        Raises:
            RequestError: the text is too short.
        """
        text_tokens = np.array(text[:IMPORTANCE_TOKENS], np.int32)
        if len(text_tokens) < BLOCK_TOKENS:
            raise RequestError(
                f"the text has {len(text_tokens)} tokens; take one of {TOKENS} or more"
            )
        reader = _Reader(self._program, threads)
        weights = self._loaded(threads)
        matrix = importance or reader.importance(weights, text_tokens)
        tokens = text_tokens[:TOKENS]
        base = reader.read(weights, tokens)
        groups = _groups(list(self._matrices))
        sensitivity: dict[str, float] = {}
        with ThreadPoolExecutor(threads) as pool:
            for done, group in enumerate(groups):
                if progress is not None:
                    progress(done, len(groups) + 1)
                changed, error = _probed([self._matrices[name] for name in group], matrix, pool)
                kl = float(kl_divergence(base, reader.read({**weights, **changed}, tokens)).mean())
                sensitivity.update(dict.fromkeys(group, max(kl, 0.0) / error if error else 0.0))
            del weights
            if progress is not None:
                progress(len(groups), len(groups) + 1)
            for name, tensor in self._matrices.items():
                columns = matrix.importance(gguf_name(name))
                errors = pool.map(partial(_error, tensor, importance=columns), self._choices[name])
                self._costs[name] = [sensitivity[name] * error for _, error in errors]
        self._importance, self._tokens = matrix, text_tokens[-_TRIAL_TOKENS:]

    def choose(self, room: int) -> Fit:
        """The types that should lose least; `room`: bytes for tensors, vectors included."""
        self.check(room)
        options = [
            list(zip(self._sizes[name], costs, strict=True)) for name, costs in self._costs.items()
        ]
        found = cheapest(options, room - self._vectors)
        assert found is not None, "the smallest types fit"
        chosen = list(zip(self._costs, found, strict=True))
        return Fit(
            {gguf_name(name): self._choices[name][i] for name, i in chosen},
            sum(self._costs[name][i] for name, i in chosen),
            self._importance,
        )

    def near(self, fit: Fit) -> list[Fit]:
        """Mixes that may lose less than what was chosen, whatever their size, likeliest first.

        Each with the importance of columns, by which it may be larger, and without.
        """
        shapes = {name: tensor.shape for name, tensor in self._matrices.items()}
        found = []
        for mix in MIXES.values():
            for importance in (self._importance, None):
                chosen = choose_types(
                    mix, shapes, self._query_group, importance=importance is not None
                )
                predicted = self._predicted({name: c.type for name, c in chosen.items()})
                if predicted <= _NEAR * fit.predicted_kl:
                    types = {gguf_name(name): choice.type for name, choice in chosen.items()}
                    found.append(Fit(types, predicted, importance, mix))
        return sorted(found, key=lambda near: near.predicted_kl)

    def _predicted(self, types: Mapping[str, WeightType]) -> float:
        """Of types by canonical name; infinite where it is not known."""
        return sum(
            self._costs[name][self._choices[name].index(kind)]
            if kind in self._choices[name]
            else math.inf
            for name, kind in types.items()
        )

    def losses(self, fits: Sequence[Fit], *, threads: int) -> list[Values]:
        """The KL divergence of each choice, measured at every token of the last 1024."""
        reader = _Reader(self._program, threads)
        weights = self._loaded(threads)
        base = reader.read(weights, self._tokens)
        found = []
        with ThreadPoolExecutor(threads) as pool:
            for fit in fits:
                made = pool.map(partial(_made, fit=fit), self._matrices.values())
                changed = {tensor.name: weight_of(tensor) for tensor in made}
                other = reader.read({**weights, **changed}, self._tokens)
                found.append(kl_divergence(base, other))
        return found

    def _loaded(self, threads: int) -> NativeWeights:
        with WeightLoading.from_file(self._checkpoint, self._program, threads) as loading:
            return loading.finish()


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Matrices that share a sensitivity: of one kind, in neighbouring layers."""
    layers = 1 + max((int(m[1]) for m in map(_LAYER.fullmatch, names) if m), default=0)
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        found = _LAYER.fullmatch(name)
        key = (found[2], int(found[1]) * _PARTS // layers) if found else (name, 0)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


class _Reader:
    """Reads the same tokens with other weights again and again."""

    def __init__(self, program: Program, threads: int) -> None:
        self._program, self._threads = program, threads

    def read(self, weights: NativeWeights, tokens: Ints) -> Floats:
        """Logits (n, vocab_size), each 512 tokens read from an empty cache."""
        logits = np.empty((len(tokens), self._program.config.vocab_size), np.float32)
        runner = self._runner(weights)
        for begin in range(0, len(tokens), TOKENS):
            self._read(runner, tokens[begin : begin + TOKENS], logits[begin : begin + TOKENS])
        return logits

    def importance(self, weights: NativeWeights, tokens: Ints) -> ImportanceMatrix:
        """Of the columns of all matrices."""
        runner = self._runner(weights)
        runner.collect_squares(True)
        for begin in range(0, len(tokens), TOKENS):
            part = tokens[begin : begin + TOKENS]
            # The head sees the tokens whose logits are asked for.
            self._read(runner, part, np.empty((len(part), self._program.config.vocab_size), "f4"))
        squares = runner.squares()
        sums = {
            gguf_name(name): np.array(squares[index], np.float32)
            for index, name in multiplied(self._program)
        }
        pieces = -(-len(tokens) // TOKENS)
        return ImportanceMatrix(sums, dict.fromkeys(sums, len(tokens)), (), pieces, TOKENS)

    def _runner(self, weights: NativeWeights) -> SummingRunner:
        return build_runner(
            self._program,
            weights,
            kv_blocks=TOKENS // BLOCK_TOKENS,
            threads=self._threads,
            max_step_tokens=_ROWS,
        )

    def _read(self, runner: SummingRunner, tokens: Ints, logits: Floats) -> None:
        """From an empty cache."""
        table = np.arange(TOKENS // BLOCK_TOKENS, dtype=np.int32)[None]
        for begin in range(0, len(tokens), _ROWS):
            places = np.arange(begin, min(begin + _ROWS, len(tokens)), dtype=np.int32)
            runner.step(
                tokens[places], places, np.zeros_like(places), table, places - np.int32(begin),
                logits[places[0] : places[-1] + 1],
            )  # fmt: skip


def _probed(
    tensors: Sequence[Tensor], matrix: ImportanceMatrix, pool: ThreadPoolExecutor
) -> tuple[NativeWeights, float]:
    """A group quantized, and the error that this makes."""

    def one(tensor: Tensor) -> tuple[Tensor, float]:
        kind = fitting(_PROBE, tensor.columns)
        return _error(tensor, kind, matrix.importance(gguf_name(tensor.name)))

    made = list(pool.map(one, tensors))
    changed: NativeWeights = {tensor.name: weight_of(tensor) for tensor, _ in made}
    return changed, sum(error for _, error in made)


def _error(
    tensor: Tensor, weight_type: WeightType, importance: Floats | None
) -> tuple[Tensor, float]:
    """A matrix in another type, and its squared error, weighted by the importance of columns."""
    pieces, error = [], 0.0
    for rows in _row_pieces(tensor):
        made = quantize(rows, tensor.type, tensor.columns, weight_type, importance)
        difference = dequantize(made, weight_type, tensor.columns)
        difference -= dequantize(rows, tensor.type, tensor.columns)
        by_column = np.einsum("ij,ij->j", difference, difference).astype(np.float64)
        error += float((by_column if importance is None else by_column * importance).sum())
        pieces.append(made.reshape(-1))
    return replace(tensor, type=weight_type, data=np.concatenate(pieces)), error


def _made(tensor: Tensor, fit: Fit) -> Tensor:
    """A matrix as a choice has it."""
    name = gguf_name(tensor.name)
    columns = fit.importance.importance(name) if fit.importance is not None else None
    pieces = [
        quantize(rows, tensor.type, tensor.columns, fit.types[name], columns).reshape(-1)
        for rows in _row_pieces(tensor)
    ]
    return replace(tensor, type=fit.types[name], data=np.concatenate(pieces))


def better(losses: Values, mix_losses: Values) -> bool:
    """Whether losses, token by token, are clearly below those of a mix."""
    gain = Estimate.of(mix_losses - losses)
    return gain.value > _CLEAR * gain.error


def _row_pieces(tensor: Tensor) -> Iterator[npt.NDArray[np.uint8]]:
    data = tensor.data.reshape(tensor.rows, -1)
    step = max(1, (1 << 19) // tensor.columns)
    for begin in range(0, tensor.rows, step):
        yield data[begin : begin + step]


def quantize_to_fit(
    source: str | Path,
    target: str | Path | None,
    size: Size,
    text: str,
    text_name: str,
    *,
    importance: ImportanceMatrix | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    measuring: Progress | None = None,
    progress: Progress | None = None,
) -> tuple[Quantized, Fit]:
    """Write a model as a GGUF file of at most a size, at the least loss on a text.

    Args:
        source, overwrite, dry_run, progress: as for `quantize_files`.
        target: the .gguf file to write; None: NAME.FIT.gguf in the working folder.
        size: of the file.
        text: what the loss is measured on; about 3000 words count.
        text_name: what the file says of it.
        importance: of columns; None: measured on the text.
        threads: default: as many as the CPUs, their cores and the cgroup allow.
        measuring: told how many models have been measured, and of how many.

    Raises:
        As `quantize_files`; RequestError where nothing fits, or the model has no tokenizer.
    """
    workers = choose_threads(threads=threads).value
    whole = quantize_files(source, target, MIXES["F16"], dry_run=True)
    if size.bits_per_weight is not None:
        room = int(size.bits_per_weight * whole.weights / 8)
    else:
        header = whole.nbytes - int(whole.bits_per_weight * whole.weights / 8)
        room = size.nbytes - header - _METADATA_BYTES
    checkpoint = open_checkpoint(source)
    try:
        path = default_target(checkpoint, _FIT) if target is None else Path(target)
        if not dry_run:
            # Before minutes of work.
            if path.exists() and not overwrite:
                raise OutputError(f"{path}: is there already; --force replaces it")
            check_output(path)
        tokens = tokens_of(text, checkpoint)
        job = Fitting(checkpoint)
        job.check(room)
        job.measure(tokens, threads=workers, importance=importance, progress=measuring)
        fit = job.choose(room)

        def write(fit: Fit, dry_run: bool) -> Quantized:
            return _written(
                source, path, fit, text_name if importance is None else None,
                overwrite=overwrite, dry_run=dry_run, threads=workers, progress=progress,
            )  # fmt: skip

        mixes = [near for near in job.near(fit) if size.holds(write(near, True))]
        if mixes:
            own, *others = job.losses([fit, *mixes], threads=workers)
            best = min(range(len(mixes)), key=lambda i: others[i].mean())
            if not better(own, others[best]):
                fit = mixes[best]
    finally:
        checkpoint.close()
    return write(fit, dry_run), fit


def _written(
    source: str | Path, target: Path, fit: Fit, text_name: str | None, **how: Any
) -> Quantized:
    """The file of a choice; `text_name`: what importance was measured on, None: it was given."""
    overrides: list[tuple[str, WeightType]] = []
    mix = fit.mix
    if mix is None:
        base = Counter(fit.types.values()).most_common(1)[0][0]
        near = next(mix for mix in MIXES.values() if mix.base is base)
        mix = replace(_FIT, base=base, file_type=near.file_type)
        overrides = [(f"^{re.escape(name)}$", kind) for name, kind in fit.types.items()]
    matrix = fit.importance
    if matrix is not None and text_name is not None:
        matrix = replace(matrix, datasets=matrix.datasets or (text_name,))
    return quantize_files(
        source,
        target,
        mix,
        overrides=overrides,
        importance=matrix,
        importance_name="" if text_name is None else "measured by smolrun quantize --fit",
        **how,
    )
