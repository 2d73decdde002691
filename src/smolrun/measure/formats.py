"""The formats of one model, made and measured: size, speed and quality in one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smolrun.api.quantization import quantize
from smolrun.engine.likelihood import WINDOW_TOKENS, text_windows
from smolrun.errors import RequestError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.measure.bench import ModelReport, Plan, Row, measure_model
from smolrun.measure.ceilings import CeilingMeter, Ceilings
from smolrun.measure.comparison import compare
from smolrun.measure.divergence import Divergence
from smolrun.measure.tables import Table
from smolrun.measure.text import tokens_of
from smolrun.quant.mixes import find_mix

PLAN = Plan(
    prompt_tokens=(512,),
    decode_tokens=(64,),
    depths=(0,),
    sequences=(),
    repetitions=3,
    check=False,
)


@dataclass(frozen=True)
class FormatFile:
    """A file of the model in one format."""

    name: str  # of the format
    path: Path
    nbytes: int
    weights: int
    made: bool  # now; else it was found

    @property
    def bits_per_weight(self) -> float:
        """All of the file, metadata and vocabulary included."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class FormatResult:
    """What was measured of one format."""

    file: FormatFile
    speed: ModelReport
    quality: Divergence  # against the source
    efficient: bool  # no other format is both smaller and better

    def as_dict(self, ceilings: Ceilings) -> dict[str, object]:
        """For JSON."""
        file = asdict(self.file) | {"path": str(self.file.path)}
        return {
            "format": self.file.name,
            "file": file | {"bits_per_weight": self.file.bits_per_weight},
            "speed": self.speed.as_dict(ceilings),
            "quality": self.quality.as_dict(),
            "efficient": self.efficient,
        }


@dataclass(frozen=True)
class FormatTable:
    """All formats of one model, and what they were measured with."""

    source: str
    ceilings: Ceilings
    results: list[FormatResult]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "source": self.source,
            "ceilings": self.ceilings.as_dict(),
            "formats": [result.as_dict(self.ceilings) for result in self.results],
        }

    def parts(self) -> Iterator[Table | str]:
        """The table, and what it stands on."""
        header = (
            "format", "file", "bits per weight", "peak memory", "prefill tokens/s", "of ceiling",
            "decode tokens/s", "of ceiling", "perplexity", "KL", "same top-1", "efficient",
        )  # fmt: skip
        yield Table(
            f"Formats of {self.source}", header, [self._cells(result) for result in self.results]
        )
        quality = self.results[0].quality.perplexity
        ceilings = ", ".join(
            f"{name} {self.ceilings.ceiling(name) / 1e9:.0f}" for name in self.ceilings.rates
        )
        yield f"KL (nats) and top-1 against {self.source}, over {quality.tokens} tokens."
        yield (
            f"{self.ceilings.isa}, {self.ceilings.threads} threads; ceilings in GB/s and GOP/s: "
            f"{ceilings}."
        )
        yield "Efficient: no other format is both smaller and better."

    def _cells(self, result: FormatResult) -> tuple[str, ...]:
        file, quality, peak = result.file, result.quality, result.speed.peak_bytes
        return (
            file.name,
            f"{file.nbytes / 1e6:.0f} MB",
            f"{file.bits_per_weight:.2f}",
            f"{peak.median / 1e6:.0f} MB" if peak else "",
            *self._speed_cells(result.speed.rows[0]),
            *self._speed_cells(result.speed.rows[1]),
            f"{quality.perplexity.value:.3f} ± {quality.perplexity.error:.3f}",
            f"{quality.kl.value:.1e} ± {quality.kl.error:.0e}",
            f"{quality.top1.value:.2%}",
            "yes" if result.efficient else "",
        )

    def _speed_cells(self, row: Row) -> tuple[str, str]:
        share = self.ceilings.share(row.work, row.seconds.median) or 0
        return f"{row.tokens_per_second.median:.0f}", f"{share:.0%}"


def measure_formats(
    source: Path,
    folder: Path,
    names: Sequence[str],
    text: str,
    meter: CeilingMeter,
    *,
    window: int = WINDOW_TOKENS,
    plan: Plan = PLAN,
    progress: Callable[[str], None] = lambda text: None,
    **reading: Any,
) -> FormatTable:
    """Make the formats that are not there yet, then measure each.

    Args:
        source: the model; the best that there is of it, as quality is measured against it.
        folder: where the files are, or are made; it is made if need be.
        names: mixes and weight types.
        text: what quality is measured on.
        meter: measures the machine's ceilings on the way.
        window: tokens of a window of text.
        plan: what of speed is measured: one prompt and one decode.
        progress: called with what is being done.
        reading: `dtype` and `activations` of `Model`.

    Raises:
        RequestError: no such format, or the text is shorter than a window. Others as `quantize`
            and `Model`.
    """
    try:
        names = list(dict.fromkeys(find_mix(name).name for name in names))
    except ValueError as error:
        raise RequestError(str(error)) from None
    _check_text(source, text, window)
    files = [_format_file(source, folder, name, progress) for name in names]
    measured: list[tuple[FormatFile, ModelReport, Divergence]] = []
    for file in files:
        speed = measure_model(file.path, plan, meter, progress=progress, **reading)
        found = compare(
            source,
            [file.path],
            text,
            window=window,
            split=False,
            progress=_counting(f"{file.name}: windows of text", progress),
            threads=meter.threads,
            **reading,
        )
        measured.append((file, speed, found.others[0].whole))
    meter.measure(samples=5)
    marks = efficient([(file.nbytes, quality.kl.value) for file, _, quality in measured])
    results = [FormatResult(*row, mark) for row, mark in zip(measured, marks, strict=True)]
    return FormatTable(source.name, meter.ceilings, results)


def efficient(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For (size, loss): whether nothing is at most as large and at most as lossy, and less in one.

    Of equals all are efficient.
    """
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] <= point[1] for other in points
        )
        for point in points
    ]


def model_stem(source: Path) -> str:
    """The name of a model's file without its ending, or that of its folder: SmolLM2-1.7B."""
    return source.stem if source.suffix in (".gguf", ".safetensors") else source.resolve().name


def _check_text(source: Path, text: str, window: int) -> None:
    """Raise RequestError now, rather than after files were made, where it can not be read."""
    checkpoint = open_checkpoint(source)
    try:
        text_windows(len(tokens_of(text, checkpoint)), window)
    finally:
        checkpoint.close()


def _format_file(
    source: Path, folder: Path, name: str, progress: Callable[[str], None]
) -> FormatFile:
    # `model.F16.gguf` is a source like `model`: the format at its end is not part of the name.
    stem = re.sub(r"[-.](f32|f16|bf16|i?q\d\w*)$", "", model_stem(source), flags=re.IGNORECASE)
    path = folder / f"{stem}.{name}.gguf"
    made = not path.exists() or path.stat().st_mtime_ns < _changed(source)
    if made:
        folder.mkdir(parents=True, exist_ok=True)
        quantize(
            source,
            path,
            name,
            overwrite=True,
            progress=_counting(f"{name}: writing bytes", progress),
        )
    checkpoint = open_checkpoint(path)
    try:
        return FormatFile(name, path, path.stat().st_size, checkpoint.config.num_parameters, made)
    finally:
        checkpoint.close()


def _changed(source: Path) -> int:
    """When a model's file, or the last of its folder's, was written, in nanoseconds."""
    files = [source]
    if source.is_dir():
        files = [f for f in source.iterdir() if f.suffix in (".safetensors", ".json", ".jinja")]
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _counting(what: str, progress: Callable[[str], None]) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"{what}, {done / max(total, 1):.0%}")
