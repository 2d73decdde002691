"""What was measured, as JSON, Markdown, or tables on a terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smolrun.measure.bench import ModelReport, Row
from smolrun.measure.ceilings import NAMES, Ceilings
from smolrun.measure.profile import ProfileTable
from smolrun.measure.samples import Samples
from smolrun.measure.tables import Table, markdown, print_parts

if TYPE_CHECKING:
    from rich.console import Console

BUSY = 0.5  # load average before the run from which on others are in the way
FORMAT_VERSION = 1  # of the JSON; raised when a field changes its meaning


@dataclass
class Report:
    """One run of the bench."""

    version: str
    cpu_name: str
    ceilings: Ceilings  # of the whole run
    load_average: float | None  # of the last minute, before the run; None where nobody counts it
    models: list[ModelReport] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Everything, for JSON. Seconds, bytes, operations, and shares from 0 to 1."""
        return {
            "format_version": FORMAT_VERSION,
            "smolrun": self.version,
            "cpu_name": self.cpu_name,
            "load_average": self.load_average,
            "ceilings": self.ceilings.as_dict(),
            "models": [model.as_dict(self.ceilings) for model in self.models],
        }

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.as_dict(), ensure_ascii=False, indent=1)

    def as_markdown(self) -> str:
        """Tables and notes."""
        return self.headline() + "\n" + markdown(self._parts())

    def print_tables(self, console: Console) -> None:
        """The same with rich."""
        print_parts([self.headline(), *self._parts()], console)

    def headline(self) -> str:
        """What was measured with."""
        threads = self.ceilings.threads
        text = f"smolrun {self.version}, {self.cpu_name or 'unknown processor'}, "
        text += f"{self.ceilings.isa}, {threads} thread{'s' if threads > 1 else ''}"
        if self.load_average is not None:
            text += f", load average {self.load_average:.1f} before"
        return text

    def _parts(self) -> Iterator[Table | str]:
        yield _ceilings_table(self.ceilings)
        if self.load_average is not None and self.load_average >= BUSY:
            yield (
                "Other programs kept this machine busy: times are longer than they need be, and "
                "only figures of one run can be compared."
            )
        for model in self.models:
            yield _model_table(model, self.ceilings)
            yield from _model_lines(model)
            for profile in model.profiles:
                yield _profile_table(profile, self.ceilings)


def load_average() -> float | None:
    """Processes that ran or wanted to, over the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _ceilings_table(ceilings: Ceilings) -> Table:
    rows = []
    for name, samples in ceilings.rates.items():
        unit = "GB/s" if name == "read" else "GOP/s"
        figures = (samples.high, samples.median, samples.least, samples.greatest)
        rows.append((f"{NAMES[name]}, {unit}", *(f"{value / 1e9:.1f}" for value in figures)))
    return Table("Ceilings of this machine", ("what", "ceiling", "median", "min", "max"), rows)


def _model_table(model: ModelReport, ceilings: Ceilings) -> Table:
    total = sum(model.weight_types.values())
    mix = ", ".join(
        name + (f" {size / total:.0%}" if len(model.weight_types) > 1 else "")
        for name, size in model.weight_types.items()
    )
    title = f"{model.name}: {mix}, {model.file_bytes / 1e6:.1f} MB"
    header = ("work", "tokens/s", "min", "max", "GB/s", "GOP/s", "of ceiling", "limit")
    return Table(title, header, [_row_cells(row, ceilings) for row in model.rows])


def _row_cells(row: Row, ceilings: Ceilings) -> tuple[str, ...]:
    rate = row.tokens_per_second
    return (
        row.name,
        *(f"{value:.1f}" for value in (rate.median, rate.least, rate.greatest)),
        f"{row.bytes_per_second / 1e9:.1f}",
        f"{row.operations_per_second / 1e9:.0f}",
        f"{ceilings.share(row.work, row.seconds.median) or 0:.0%}",
        ceilings.bound(row.work)[1],
    )


def _model_lines(model: ModelReport) -> Iterator[str]:
    if model.first_token is not None:
        yield f"Process start to first token: {_spread(model.first_token, 1, 's', 2)}"
    if model.peak_bytes is not None:
        over = (model.peak_bytes.median - model.file_bytes) / 1e6
        spread = _spread(model.peak_bytes, 1e6, "MB", 0)
        yield f"Peak memory of that process: {spread}, the file and {over:.0f} MB"
    if model.stamp is not None:
        yield f"Correctness: {model.stamp}"
    yield from model.notes


def _spread(samples: Samples, unit: float, name: str, digits: int) -> str:
    median, least, greatest = (
        f"{value / unit:.{digits}f}" for value in (samples.median, samples.least, samples.greatest)
    )
    return f"{median} {name} ({least} to {greatest})"


def _profile_table(profile: ProfileTable, ceilings: Ceilings) -> Table:
    title = f"{profile.title}: {profile.seconds * 1e3:.2f} ms, median of {profile.steps} steps"
    header = ("operation", "count", "ms", "share", "GB/s", "GOP/s", "of ceiling", "limit")
    rows = []
    for row in profile.rows:
        share = ceilings.share(row.work, row.seconds)
        judged = ("", "", "", "")
        if share is not None:
            judged = (
                f"{row.work.bytes / row.seconds / 1e9:.1f}",
                f"{row.work.total_operations / row.seconds / 1e9:.0f}",
                f"{share:.0%}",
                ceilings.bound(row.work)[1],
            )
        rows.append(
            (
                row.name,
                f"{row.count}" if row.count else "",
                f"{row.seconds * 1e3:.3f}",
                f"{row.share:.1%}",
                *judged,
            )
        )
    return Table(title, header, rows)
