"""Files of one model, measured against one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolrun.api import Model
from smolrun.engine.likelihood import WINDOW_TOKENS, text_windows
from smolrun.errors import RequestError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.measure.divergence import Divergence, Estimate, check_vocabularies, side_by_side
from smolrun.measure.tables import Table
from smolrun.quant.types import WeightType


@dataclass(frozen=True)
class Compared:
    """One of the other models."""

    name: str
    whole: Divergence  # as it runs, against the base
    format: Divergence | None  # computed exactly, against the base; None: it runs exactly anyway
    arithmetic: Divergence | None  # as it runs, against its own exact reading

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        parts = {"whole": self.whole, "format": self.format, "arithmetic": self.arithmetic}
        return {"model": self.name} | {
            name: part.as_dict() if part else None for name, part in parts.items()
        }


@dataclass(frozen=True)
class Comparison:
    """All of them, and the base's own perplexity."""

    base: str
    base_divergence: Divergence
    others: list[Compared]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        perplexity = self.base_divergence.as_dict()["perplexity"]
        others = [other.as_dict() for other in self.others]
        return {"base": self.base, "perplexity": perplexity, "others": others}

    def parts(self) -> Iterator[Table | str]:
        """A table, and what it stands on."""
        header = ("model", "KL mean", "median", "99 %", "most", "same top-1", "perplexity", "ratio")
        base = self.base_divergence.perplexity
        rows = [(self.base, *[""] * 5, f"{base.value:.3f} ± {base.error:.3f}", "")]
        for other in self.others:
            rows.append(_cells(other.name, other.whole))
            if other.format is not None and other.arithmetic is not None:
                rows.append(_cells("  its format alone", other.format))
                rows.append(_cells("  its arithmetic alone", other.arithmetic))
        yield Table(f"Against {self.base}", header, rows)
        yield f"{base.tokens} tokens in {base.windows} windows; ± is one standard error."


def compare(
    base: Path,
    others: Sequence[Path],
    text: str,
    *,
    window: int = WINDOW_TOKENS,
    split: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **reading: Any,
) -> Comparison:
    """Read a text with all models side by side.

    Args:
        base, others: files or folders of models with the same vocabulary.
        text: what to read; at least `window` tokens.
        window: tokens of a window, of which the second half counts.
        split: tell the format's loss from the arithmetic's, which takes another reading.
        progress: called with the windows done, and those in all.
        reading: `dtype`, `threads` and `activations` of `Model`. The base is computed exactly.

    Raises:
        RequestError: the models or the text can not be compared; SmolrunError: as `Model`.
    """
    with contextlib.ExitStack() as stack:

        def opened(path: Path, **options: Any) -> int:
            options = {"context_size": window, **reading, **options}
            models.append(stack.enter_context(Model(path, **options)))
            return len(models) - 1

        models: list[Model] = []
        opened(base, activations="exact")
        tokens = models[0].tokenize(text, parse_special=False)
        windows = text_windows(len(tokens), window)
        pairs = [(0, 0)]
        are_split: list[bool] = []
        for path in others:
            place = opened(path)
            check_vocabularies(models)
            if models[place].tokenize(text, parse_special=False) != tokens:
                raise RequestError(f"{path}: its tokenizer cuts the text otherwise than {base}'s")
            pairs.append((0, place))
            rounds = reading.get("activations") != "exact" and _rounds_activations(path)
            are_split.append(split and rounds)
            if are_split[-1]:
                exact = opened(path, activations="exact")
                pairs += [(0, exact), (exact, place)]
        found = iter(side_by_side(models, tokens, windows, pairs, progress))
        return Comparison(
            base.name,
            next(found),
            [
                Compared(
                    path.name,
                    next(found),
                    next(found) if is_split else None,
                    next(found) if is_split else None,
                )
                for path, is_split in zip(others, are_split, strict=True)
            ],
        )


def _rounds_activations(path: Path) -> bool:
    """Whether a file holds weights that have a fast product of their own."""
    checkpoint = open_checkpoint(path)
    try:
        return any(tensor.type is not WeightType.F32 for tensor in checkpoint.tensors.values())
    finally:
        checkpoint.close()


def _cells(name: str, found: Divergence) -> tuple[str, ...]:
    return (
        name,
        _with_error(found.kl, ".2e"),
        f"{found.kl_median:.2e}",
        f"{found.kl_99:.2e}",
        f"{found.kl_greatest:.2e}",
        f"{found.top1.value:.2%} ± {found.top1.error:.2%}",
        f"{found.perplexity.value:.3f}",
        _with_error(found.perplexity_ratio, ".5f"),
    )


def _with_error(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} ± {estimate.error:{form}}"
