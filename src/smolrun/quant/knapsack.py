"""The cheapest choice of one option from each of several lists, of which only so much fits."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

# Sizes are counted in units of which the capacity holds about this many at least.
_UNITS = 1 << 18


def cheapest(options: Sequence[Sequence[tuple[int, float]]], capacity: int) -> list[int] | None:
    """For each list of (size, cost) the index of an option; None where nothing fits.

    The sum of the sizes is at most `capacity`, and no other choice costs less: dynamic programming
    over every size that a part of the lists can have. Sizes are counted in their greatest common
    divisor; only where that leaves more than a quarter of a million units does a size count as up
    to a unit more than it is.
    """
    # What every choice takes at least need not be counted.
    least = [min(size for size, _ in choices) for choices in options]
    room = capacity - sum(least)
    if room < 0:
        return None
    extra = [
        [size - low for size, _ in choices] for choices, low in zip(options, least, strict=True)
    ]
    room = min(room, sum(map(max, extra)))
    unit = max(gcd(*(size for sizes in extra for size in sizes)), room // _UNITS, 1)
    units = room // unit
    # costs[u]: least cost of the lists so far in at most u units.
    costs = np.zeros(units + 1)
    taken = []
    for choices, sizes in zip(options, extra, strict=True):
        best = np.full(units + 1, np.inf)
        index = np.zeros(units + 1, np.uint8)
        for i, ((_, cost), size) in enumerate(zip(choices, sizes, strict=True)):
            need = -(-size // unit)
            if need > units:
                continue
            candidate = costs[: units + 1 - need] + cost
            better = candidate < best[need:]
            best[need:][better] = candidate[better]
            index[need:][better] = i
        costs = best
        taken.append(index)
    chosen = []
    left = units
    for index, sizes in zip(reversed(taken), reversed(extra), strict=True):
        i = int(index[left])
        chosen.append(i)
        left -= -(-sizes[i] // unit)
    return chosen[::-1]
