"""Typed, range-checked reading of untrusted settings (config.json, GGUF metadata)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Final, cast

from smolrun.errors import ModelFormatError, UnsupportedError


class Fields:
    """A mapping out of a model file whose values are read by type and range.

    Every error is a ModelFormatError that names the origin, the key, what was expected and what
    was found. A key with the value null counts as absent, as it does in the files of the field.
    """

    def __init__(self, values: Mapping[str, object], origin: str, prefix: str = "") -> None:
        self.values: Final = values
        self.origin: Final = origin  # "folder/config.json", "model.gguf"
        self.prefix: Final = prefix  # put before every key, here and in messages

    def has(self, key: str) -> bool:
        """Whether a key is there with a value other than null."""
        return self.values.get(self.prefix + key) is not None

    def get(self, key: str) -> object:
        """The raw value, None where absent."""
        return self.values.get(self.prefix + key)

    def error(self, key: str, expected: str, found: object = None) -> ModelFormatError:
        """What to raise where a value is not as expected."""
        shown = "nothing" if found is None else _shown(found)
        return ModelFormatError(
            f"{self.origin}: {self.prefix}{key} must be {expected}, found {shown}"
        )

    def unsupported(self, key: str, supported: str, found: object) -> UnsupportedError:
        """What to raise where a sound value asks for something that smolrun does not run."""
        return UnsupportedError(
            f"{self.origin}: {self.prefix}{key} is {_shown(found)}; smolrun runs {supported}"
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer with low <= value <= high; without a default the key must be there."""
        value = self.get(key)
        expected = f"an integer from {low} to {high}"
        if value is None:
            if default is None:
                raise self.error(key, expected)
            return default
        number = _integer(value)
        if number is None or not low <= number <= high:
            raise self.error(key, expected, value)
        return number

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number with low <= value <= high; without a default the key must be there."""
        value = self.get(key)
        expected = f"a number from {low:g} to {high:g}"
        if value is None:
            if default is None:
                raise self.error(key, expected)
            return default
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise self.error(key, expected, value)
        # The comparison comes before float(): an integer of 400 digits does not fit a float, and
        # a NaN compares false.
        if not low <= cast(float, value) <= high:
            raise self.error(key, expected, value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default the key must be there."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "a string")
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def sequence(self, key: str, length: int) -> list[object]:
        """The values of a list of at most `length`."""
        count = self.length(key, length)
        value = cast("Sequence[object]", self.get(key))
        return [value[index] for index in range(count)]

    def length(self, key: str, length: int) -> int:
        """How many values a list of at most `length` has."""
        value = self.get(key)
        # Arrays of GGUF files may be NumPy arrays or lazy sequences: only len and [] are asked.
        if (
            isinstance(value, (str, bytes, Mapping))
            or not hasattr(value, "__getitem__")
            or not hasattr(value, "__len__")
            or len(value) > length
        ):
            raise self.error(key, f"a list of at most {length} values", value)
        return len(value)

    def section(self, key: str) -> Fields | None:
        """A mapping inside this one, None where absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "a mapping", value)
        return Fields(value, f"{self.origin}: {self.prefix}{key}")


def token_id(fields: Fields, key: str, value: object, vocab_size: int) -> int:
    """A token id inside the vocabulary."""
    number = _integer(value)
    if number is None or not 0 <= number < vocab_size:
        raise fields.error(key, f"a token id from 0 to {vocab_size - 1} (vocab_size - 1)", value)
    return number


def decimal(value: float) -> float:
    """The shortest decimal number that a float32 stands for: 9.999999974752427e-07 -> 1e-06.

    GGUF stores as float32 what config.json writes in decimals; so read, both give equal configs.
    """
    import numpy as np

    single = np.float32(value)
    return float(str(single)) if math.isfinite(value) and float(single) == value else value


def _integer(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 128:
        return "an integer of more than 128 bits"  # repr of a huge integer is slow, or an error
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
