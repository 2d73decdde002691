"""Ceilings of a machine that does not exist, with numbers easy to reckon with."""

from __future__ import annotations

from smolrun.measure.ceilings import CeilingMeter, Ceilings
from smolrun.measure.samples import Samples

RATES = {"read": 10e9, "f32": 100e9, "int16": 200e9, "int8": 400e9}


def ceilings(*without: str) -> Ceilings:
    rates = {name: Samples.of([rate]) for name, rate in RATES.items() if name not in without}
    return Ceilings("scalar", 2, rates)


class FixedMeter(CeilingMeter):
    """Measures nothing, at once."""

    def __init__(self, threads: int = 2) -> None:
        super().__init__("scalar", threads)
        self.calls = 0

    def measure(self, samples: int) -> None:
        self.calls += 1

    @property
    def ceilings(self) -> Ceilings:
        return ceilings()
