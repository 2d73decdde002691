"""What the machine can do at most, and how far a measurement is from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smolrun.measure.samples import Samples
from smolrun.measure.work import Work

NAMES = {
    "read": "streaming read",
    "f32": "float32 multiply-add",
    "int16": "int16 dot product",
    "int8": "int8 dot product",
}


@dataclass(frozen=True)
class Ceilings:
    """Rates that loops reach which do nothing else, on as many threads as the model gets.

    Neighbours slow a probe down, so samples are short and many, and the ceiling is close to the
    best: what only a hundredth exceed, as clocks of virtual machines jump now and then.
    """

    isa: str
    threads: int
    rates: Mapping[str, Samples]  # "read": bytes a second; the others: operations a second

    def ceiling(self, name: str) -> float:
        """Bytes a second for "read"; operations for an arithmetic, float32's for one not here."""
        return self.rates.get(name, self.rates["f32"]).high

    def bound(self, work: Work) -> tuple[float, str]:
        """Least seconds for some work, and what it waits for: "memory" or an arithmetic.

        Reading and computing may overlap wholly; different kinds of arithmetic do not.
        """
        reading = work.bytes / self.ceiling("read")
        computing = {name: count / self.ceiling(name) for name, count in work.operations.items()}
        if not computing or reading >= sum(computing.values()):
            return reading, "memory"
        return sum(computing.values()), max(computing, key=lambda name: computing[name])

    def share(self, work: Work, seconds: float) -> float | None:
        """How near some work came to the least time, 1 being there; None where nothing was done."""
        least, _ = self.bound(work)
        return least / seconds if least and seconds else None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "isa": self.isa,
            "threads": self.threads,
            "rates": {
                name: {"ceiling": samples.high, **samples.as_dict()}
                for name, samples in self.rates.items()
            },
        }


class CeilingMeter:
    """Measures ceilings again and again, between other measurements, and keeps every sample.

    On a machine with neighbours a figure moves by a fifth from one second to the next, and only
    what was measured in between can be compared.
    """

    def __init__(self, isa: str, threads: int) -> None:
        self.isa = isa
        self.threads = threads
        self._rates: dict[str, list[float]] = {}

    def measure(self, samples: int) -> None:
        """Run the probes: 15 ms for a sample of each."""
        from smolrun.engine.machine import measured_ceilings

        for name, rates in measured_ceilings(self.isa, self.threads, samples).items():
            self._rates.setdefault(name, []).extend(rates)

    @property
    def ceilings(self) -> Ceilings:
        """What was found so far."""
        rates = {name: Samples.of(values) for name, values in self._rates.items()}
        return Ceilings(self.isa, self.threads, rates)
