"""The formats of a model as a picture: quality against size, the dots as large as they are fast."""

from __future__ import annotations

import io
from pathlib import Path

from smolrun.errors import ResourceError
from smolrun.files.output import atomic_output, check_output
from smolrun.measure.formats import FormatTable

SUFFIXES = (".svg", ".png")


def check_plot(path: Path) -> None:
    """ResourceError where matplotlib is not installed, OutputError where `path` can not be."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ResourceError(
            "a plot needs matplotlib: pip install 'smolrun[plot]', or leave --plot out"
        ) from None
    check_output(path)


def save_plot(table: FormatTable, path: Path) -> None:
    """Write `path`, a .svg or .png file; errors as `check_plot`."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    fastest = max(result.speed.rows[1].tokens_per_second.median for result in table.results)
    for result in table.results:
        size, loss = result.file.nbytes / 1e6, result.quality.kl.value
        speed = result.speed.rows[1].tokens_per_second.median
        color = "tab:blue" if result.efficient else "tab:gray"
        axes.scatter(size, max(loss, 1e-9), s=400 * speed / fastest, color=color, alpha=0.7)
        label = f"{result.file.name}\n{speed:.0f} tokens/s"
        axes.annotate(label, (size, max(loss, 1e-9)), xytext=(8, 8), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("file, MB")
    axes.set_ylabel(f"mean KL divergence from {table.source}, nats")
    axes.set_title("Down and to the left is better; larger dots write faster")
    axes.margins(0.15)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."))
    with atomic_output(path) as output:
        output.write(picture.getbuffer())
