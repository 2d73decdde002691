"""The probes of the machine's ceilings."""

from __future__ import annotations

import pytest

from smolrun import _core

MEBIBYTE = 1 << 20


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_every_instruction_set_has_its_ceilings(isa: str, threads: int) -> None:
    found = _core.ceilings(isa, threads, samples=3, read_bytes=4 * MEBIBYTE)
    assert list(found) == ["read", "f32", "int16", "int8"]
    assert all(len(rates) == 3 for rates in found.values())
    # No CPU runs a loop of less than an operation in ten nanoseconds, or ten million in one.
    assert all(1e8 < rate < 1e16 for rates in found.values() for rate in rates)


def test_arguments_are_checked() -> None:
    for arguments, words in (
        (("avx9", 1, 1, MEBIBYTE), "avx9"),
        (("scalar", 0, 1, MEBIBYTE), "threads"),
        (("scalar", 1, 0, MEBIBYTE), "samples"),
        (("scalar", 1, 1, 5), "read_bytes"),
        (("scalar", 1, 1, 1 << 60), "read_bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            _core.ceilings(*arguments)
