"""Intervals as they stand in the JSON files, and sums of independent ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from clipmoe_vlm.intervals import Interval


def bounds(interval: Interval) -> list[float] | None:
    """`[low, high]`; None where a single picture tells nothing about the spread."""
    return None if math.isnan(interval.low) else [interval.low, interval.high]


def difference(a: Sequence[float], b: Sequence[float], interval: Interval) -> dict[str, Any]:
    """One line of compare.json: both means, and `b - a` with its interval and p-value."""
    p_value = None if interval.p_value is None or math.isnan(interval.p_value) else interval.p_value
    return {"a": sum(a) / len(a), "b": sum(b) / len(b), "difference": interval.mean, "interval": bounds(interval),
            "p_value": p_value, "n": interval.n, "pictures": interval.clusters}


def sum_interval(intervals: Sequence[Interval]) -> Interval:
    """The sum of independent means (MME's total over its subtasks, whose pictures differ), two-sided p-value included.

    Variances add; the quantile is Student's t with the degrees of freedom of all parts together.
    """
    from scipy import stats

    mean = sum(one.mean for one in intervals)
    error = math.sqrt(sum(one.standard_error**2 for one in intervals))
    n, clusters = sum(one.n for one in intervals), sum(one.clusters for one in intervals)
    if math.isnan(error):
        return Interval(mean, error, error, error, n, clusters, error)
    freedom = clusters - len(intervals)
    half = float(stats.t.ppf(0.975, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, error, n, clusters, p_value)
