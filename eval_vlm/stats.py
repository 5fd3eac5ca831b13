"""Figures with their intervals as they stand in the JSON files, differences of two runs, and many p-values at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from clipmoe_vlm.intervals import Estimate, Interval, paired


def bounds(interval: Interval) -> list[float] | None:
    """`[low, high]`; None where a single picture tells nothing about the spread."""
    return None if math.isnan(interval.low) else [interval.low, interval.high]


def finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def with_spread(estimate: Estimate, name: str = "") -> dict[str, Any]:
    """`<name>_interval` and `<name>_standard_error` (without a name: as they are), for scores.json."""
    interval = estimate.interval()
    start = f"{name}_" if name else ""
    return {f"{start}interval": bounds(interval), f"{start}standard_error": finite(interval.standard_error)}


def scored(estimate: Estimate) -> dict[str, Any]:
    """A figure on its own, for scores.json."""
    return {"score": estimate.value, **with_spread(estimate), "n": estimate.n, "pictures": len(estimate.errors)}


def difference(a: Estimate, b: Estimate) -> dict[str, Any]:
    """One line of compare.json: both figures, and `b - a` on the same questions with its interval and p-value."""
    return as_line(a.value, b.value, paired(b, a).interval())


def as_line(a: float, b: float, interval: Interval) -> dict[str, Any]:
    # Where all pictures differ alike, their spread, which is none, gives no interval.
    known = interval.standard_error != 0 or interval.mean == 0
    return {"a": a, "b": b, "difference": interval.mean, "interval": bounds(interval) if known else None,
            "standard_error": finite(interval.standard_error), "p_value": finite(interval.p_value), "n": interval.n,
            "pictures": interval.clusters}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (1979): all below 0.05 hold together but for a chance of 5%; None stays None."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
