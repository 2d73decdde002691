"""Measures one model: prefill, decode, batches, start-up and memory, each beside its ceiling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smolrun.engine.machine import memory_available
from smolrun.engine.native import DEFAULT_ACTIVATIONS
from smolrun.errors import ResourceError
from smolrun.measure.ceilings import CeilingMeter, Ceilings
from smolrun.measure.child import ChildOptions, FirstAnswer, first_answer
from smolrun.measure.profile import (
    ProfileTable,
    StepTimes,
    chrome_trace,
    profile_table,
    recording,
)
from smolrun.measure.samples import Samples
from smolrun.measure.sequences import Sequences
from smolrun.measure.stamp import Stamp, memory_needed, prompt_tokens, stamp
from smolrun.measure.work import StepShape, Work, WorkCounter, chunks

if TYPE_CHECKING:
    from smolrun.engine.load import LoadedModel
    from smolrun.engine.native import Activations
    from smolrun.files.checkpoint import Checkpoint, Dtype

Progress = Callable[[str], None]
BATCH_STEPS = 32  # of batched decode, at most
PROFILED_DECODES = 8  # steps of a profile of decode
TRACED_DECODES = 4


@dataclass(frozen=True)
class Plan:
    """What is measured. Counts of tokens; 0 leaves a measurement out."""

    prompt_tokens: tuple[int, ...] = (512,)
    decode_tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0, 4096)  # tokens in the cache before a decode
    sequences: tuple[int, ...] = (1, 4, 8, 16, 32)  # of batched decode
    batch_depth: int = 128  # tokens in the cache of each of them
    repetitions: int = 5
    start: bool = True  # time and memory of a process of its own
    check: bool = True  # the correctness stamp
    profile: bool = False
    trace: bool = False

    def quick(self) -> Plan:
        """The same in a fraction of the time, with less to trust."""
        return Plan(
            prompt_tokens=tuple(min(tokens, 128) for tokens in self.prompt_tokens),
            decode_tokens=tuple(min(tokens, 16) for tokens in self.decode_tokens),
            depths=self.depths,
            sequences=tuple(count for count in self.sequences if count in (1, 8))
            or self.sequences[:1],
            batch_depth=self.batch_depth,
            repetitions=min(self.repetitions, 2),
            start=self.start,
            check=self.check,
            profile=self.profile,
            trace=self.trace,
        )


@dataclass(frozen=True)
class Row:
    """One measurement, repeated."""

    name: str
    tokens: int  # in all
    seconds: Samples
    work: Work

    @property
    def tokens_per_second(self) -> Samples:
        """Tokens per second, of all sequences."""
        return self.seconds.rate(self.tokens)

    @property
    def bytes_per_second(self) -> float:
        """Least bytes per median second."""
        return self.work.bytes / self.seconds.median

    @property
    def operations_per_second(self) -> float:
        """Operations per median second."""
        return self.work.total_operations / self.seconds.median

    def as_dict(self, ceilings: Ceilings) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second.as_dict(),
            "seconds": self.seconds.as_dict(),
            "bytes": self.work.bytes,
            "operations": dict(self.work.operations),
            "bytes_per_second": self.bytes_per_second,
            "operations_per_second": self.operations_per_second,
            "of_ceiling": ceilings.share(self.work, self.seconds.median),
            "bound": ceilings.bound(self.work)[1],
        }


@dataclass
class ModelReport:
    """What was measured of one model."""

    name: str
    weight_types: dict[str, int]  # weight type of matrices: bytes, the most first
    file_bytes: int
    num_parameters: int
    kv_bytes_per_token: int
    rows: list[Row] = field(default_factory=list)
    first_token: Samples | None = None  # seconds from process start
    peak_bytes: Samples | None = None
    stamp: Stamp | None = None
    profiles: list[ProfileTable] = field(default_factory=list)
    trace: dict[str, object] | None = None  # in the Trace Event Format
    notes: list[str] = field(default_factory=list)

    def as_dict(self, ceilings: Ceilings) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "weight_types": self.weight_types,
            "file_bytes": self.file_bytes,
            "num_parameters": self.num_parameters,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "rows": [row.as_dict(ceilings) for row in self.rows],
            "first_token_seconds": self.first_token.as_dict() if self.first_token else None,
            "peak_bytes": self.peak_bytes.as_dict() if self.peak_bytes else None,
            "stamp": self.stamp.as_dict() if self.stamp else None,
            "profiles": [profile.as_dict(ceilings) for profile in self.profiles],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class _Measurement:
    name: str
    tokens: int
    work: Work
    run: Callable[[], float]  # seconds


def measure_model(
    path: Path,
    plan: Plan,
    meter: CeilingMeter,
    *,
    dtype: Dtype = "auto",
    activations: Activations = DEFAULT_ACTIVATIONS,
    progress: Progress = lambda text: None,
) -> ModelReport:
    """Measure the model at `path` with the threads and instruction set of `meter`.

    The machine's ceilings are measured again before every round of repetitions.
    What does not fit the model's context or memory is left out, and a note says so. Errors as of
    `Model`.
    """
    from smolrun.engine.load import load_model
    from smolrun.files.checkpoint import open_checkpoint

    name = path.stem if path.suffix in (".gguf", ".safetensors") else path.name
    checkpoint = open_checkpoint(path, dtype)
    try:
        report = _described(name, checkpoint)
        if activations != DEFAULT_ACTIVATIONS:
            report.notes.append(f"activations: {activations}")
        if plan.start:
            progress(f"{name}: first token")
            options = ChildOptions(str(path), meter.threads, meter.isa, dtype, activations)
            _measure_start(report, options, plan)
        context = _context(plan, checkpoint.config.max_position_embeddings)
        progress(f"{name}: loading")
        loaded = load_model(
            path,
            dtype=dtype,
            context_size=context,
            threads=meter.threads,
            isa=meter.isa,
            activations=activations,
            max_sequences=max(1, *plan.sequences) if plan.sequences else 1,
        )
        try:
            types = {name: tensor.type for name, tensor in checkpoint.tensors.items()}
            counter = WorkCounter(loaded.program, types, activations)
            _measure_loaded(report, loaded, checkpoint, counter, plan, meter, progress)
        finally:
            loaded.engine.close()
    finally:
        checkpoint.close()
    return report


def _described(name: str, checkpoint: Checkpoint) -> ModelReport:
    types: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2:
            types[tensor.type.value] += tensor.data.nbytes
    config = checkpoint.config
    return ModelReport(
        name,
        dict(types.most_common()),
        checkpoint.file_bytes,
        config.num_parameters,
        config.kv_bytes_per_token,
    )


def _measure_start(report: ModelReport, options: ChildOptions, plan: Plan) -> None:
    first_answer(options)  # brings the file into the page cache
    found: list[FirstAnswer] = [first_answer(options) for _ in range(plan.repetitions)]
    report.first_token = Samples.of(answer.first_token_seconds for answer in found)
    report.peak_bytes = Samples.of(float(answer.peak_bytes) for answer in found)


def _context(plan: Plan, most: int) -> int:
    """Tokens of the longest sequence that is measured, or as many as the model was trained for."""
    needed = [64, *plan.prompt_tokens]
    needed += [depth + count for depth in plan.depths for count in plan.decode_tokens]
    if plan.sequences:
        needed.append(plan.batch_depth + BATCH_STEPS)
    if plan.trace:
        needed.append(max([1, *plan.prompt_tokens]) + TRACED_DECODES)
    return min(max(needed), most)


def _measure_loaded(
    report: ModelReport,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    counter: WorkCounter,
    plan: Plan,
    meter: CeilingMeter,
    progress: Progress,
) -> None:
    measurements = _prefills(report, loaded, plan, counter)
    measurements += _decodes(report, loaded, plan, counter)
    measurements += _batches(report, loaded, plan, counter)
    # Round after round, so that what a neighbour does for a while touches all of them alike.
    seconds: list[list[float]] = [[] for _ in measurements]
    for turn in range(plan.repetitions + 1):
        meter.measure(samples=20)
        for measurement, values in zip(measurements, seconds, strict=True):
            progress(f"{report.name}: {measurement.name}, {turn} of {plan.repetitions}")
            taken = measurement.run()
            if turn > 0:  # the first is a warm-up
                values.append(taken)
    for measurement, values in zip(measurements, seconds, strict=True):
        samples = Samples.of(values)
        report.rows.append(Row(measurement.name, measurement.tokens, samples, measurement.work))
    if plan.profile:
        progress(f"{report.name}: profile")
        _measure_profiles(report, loaded, plan, counter)
    if plan.trace:
        progress(f"{report.name}: trace")
        report.trace = chrome_trace(loaded.program, _traced(loaded, plan))
    if plan.check:
        progress(f"{report.name}: reading again with the reference")
        needed, left = memory_needed(loaded.program), memory_available().value
        if needed > left:
            report.notes.append(
                f"the check is left out: the reference reading takes {needed >> 20} MiB, and "
                f"{left >> 20} MiB are to be had"
            )
        else:
            report.stamp = stamp(loaded.engine, loaded.program, checkpoint.tensors)


def _prefills(
    report: ModelReport, loaded: LoadedModel, plan: Plan, counter: WorkCounter
) -> list[_Measurement]:
    engine, made = loaded.engine, []
    for count in plan.prompt_tokens:
        name = f"prefill {count}"
        if count < 1 or not _fits(report, name, count, engine.context_size):
            continue
        tokens = prompt_tokens(engine.vocab_size, count)

        def run(tokens: np.ndarray = tokens) -> float:
            with Sequences(engine, 1, len(tokens)) as sequences:
                return sequences.prefill(tokens)

        work = counter.steps(chunks(count, 0, engine.max_step_tokens))
        made.append(_Measurement(name, count, work, run))
    return made


def _decodes(
    report: ModelReport, loaded: LoadedModel, plan: Plan, counter: WorkCounter
) -> list[_Measurement]:
    made = []
    for depth in plan.depths:
        for count in plan.decode_tokens:
            name = f"decode {count}" + (f" at {depth}" if depth else "")
            made += _decode(report, loaded, counter, name, 1, depth, count)
    return made


def _batches(
    report: ModelReport, loaded: LoadedModel, plan: Plan, counter: WorkCounter
) -> list[_Measurement]:
    made = []
    for sequences in plan.sequences:
        count = min([BATCH_STEPS, *(tokens for tokens in plan.decode_tokens if tokens)])
        name = f"{sequences} sequence{'s' if sequences > 1 else ''}: decode {count}"
        name += f" at {plan.batch_depth}" if plan.batch_depth else ""
        made += _decode(report, loaded, counter, name, sequences, plan.batch_depth, count)
    return made


def _decode(
    report: ModelReport,
    loaded: LoadedModel,
    counter: WorkCounter,
    name: str,
    sequences: int,
    depth: int,
    count: int,
) -> list[_Measurement]:
    """The measurement, or none where there is nothing to measure or no room for it."""
    engine = loaded.engine
    if count < 1 or sequences < 1 or not _fits(report, name, depth + count, engine.context_size):
        return []
    try:  # the blocks are to be had now, or never
        Sequences(engine, sequences, depth + count).close()
    except ResourceError as error:
        report.notes.append(f"{name} is left out: {error}")
        return []
    first = prompt_tokens(engine.vocab_size, sequences)

    def run() -> float:
        with Sequences(engine, sequences, depth + count) as running:
            return running.decode(first, depth, count)[0]

    shapes = (StepShape(1, depth + step, sequences) for step in range(count))
    return [_Measurement(name, sequences * count, counter.steps(shapes), run)]


def _fits(report: ModelReport, name: str, tokens: int, context: int) -> bool:
    if tokens <= context:
        return True
    report.notes.append(f"{name} is left out: the model's context holds {context} tokens")
    return False


def _measure_profiles(
    report: ModelReport, loaded: LoadedModel, plan: Plan, counter: WorkCounter
) -> None:
    """One prefill chunk, and one decode step at each depth."""
    engine, program = loaded.engine, loaded.program
    size = min([engine.max_step_tokens, *(count for count in plan.prompt_tokens if count)])
    tokens = prompt_tokens(engine.vocab_size, size)
    with Sequences(engine, 1, size) as sequences, recording(sequences) as steps:
        for _ in range(plan.repetitions + 1):
            sequences.prefill(tokens)
    title = f"prefill of {size} tokens"
    report.profiles.append(profile_table(title, program, counter, steps[1:]))
    for depth in plan.depths:
        if depth + 1 > engine.context_size:
            continue
        with Sequences(engine, 1, depth + 1) as sequences, recording(sequences) as steps:
            for _ in range(PROFILED_DECODES + 1):
                sequences.decode(tokens[:1], depth, 1)
        title = "decode of a token" + (f" at {depth}" if depth else "")
        report.profiles.append(profile_table(title, program, counter, steps[1:]))


def _traced(loaded: LoadedModel, plan: Plan) -> list[StepTimes]:
    """A prompt and a few tokens after it."""
    engine = loaded.engine
    size = min(max([1, *plan.prompt_tokens]), engine.context_size - TRACED_DECODES)
    tokens = prompt_tokens(engine.vocab_size, size)
    with Sequences(engine, 1, size + TRACED_DECODES) as sequences:
        sequences.prefill(tokens)  # warm
        with recording(sequences) as steps:
            sequences.prefill(tokens)
            sequences.decode(tokens[:1], size, TRACED_DECODES)
    return steps
