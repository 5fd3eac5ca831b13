"""95% intervals for means over questions that share pictures, and for paired differences of two models.

Questions about one picture are not independent: the standard errors are cluster-robust (Liang and Zeger 1986, with the
small-sample factor G / (G - 1)), the quantile is Student's t with G - 1 degrees of freedom, G being the number of
clusters. Figures that are no means (F1, MME's score) take the percentile bootstrap over clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval; `p_value` (two-sided, against 0) only for differences."""

    mean: float
    low: float
    high: float
    standard_error: float
    n: int
    clusters: int
    p_value: float | None = None


def cluster_interval(values: Sequence[float], clusters: Sequence | None = None) -> Interval:
    """Mean of `values` with its 95% interval; `clusters` gives each value's cluster (default: all independent).

    With a single cluster nothing is known about the spread: the interval is NaN.

    Raises:
        ValueError: no values, or not one cluster per value.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise ValueError("an interval needs at least one value")
    if clusters is None:
        index, count = np.arange(len(x)), len(x)
    else:
        if len(clusters) != len(x):
            raise ValueError(f"{len(x)} values but {len(clusters)} cluster names")
        names, index = np.unique(np.asarray(clusters), return_inverse=True)
        count = len(names)
    mean = float(x.mean())
    if count < 2:
        return Interval(mean, float("nan"), float("nan"), float("nan"), len(x), count)
    from scipy import stats

    sums = np.bincount(index, weights=x - mean, minlength=count)
    error = float(np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(x))
    half = float(stats.t.ppf(0.975, count - 1)) * error
    return Interval(mean, mean - half, mean + half, error, len(x), count)


def paired_interval(a: Sequence[float], b: Sequence[float], clusters: Sequence | None = None) -> Interval:
    """Mean of `a - b` on the same questions, with its 95% interval and a two-sided t-test's p-value."""
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same questions: {len(a)} against {len(b)}")
    from scipy import stats

    result = cluster_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), clusters)
    if np.isnan(result.standard_error):
        p_value = float("nan")
    elif result.standard_error == 0:
        p_value = 1.0 if result.mean == 0 else 0.0
    else:
        p_value = float(2 * stats.t.sf(abs(result.mean) / result.standard_error, result.clusters - 1))
    return Interval(**{**result.__dict__, "p_value": p_value})


def bootstrap_interval(statistic: Callable[[np.ndarray], float], clusters: Sequence, seed: int = 0,
                       resamples: int = 1000) -> Interval:
    """Percentile bootstrap over clusters of `statistic`, which takes the indices of the drawn values.

    Args:
        statistic: `[n] -> float`; called with repeated indices.
        clusters: each value's cluster.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        drawn = generator.integers(len(names), size=len(names))
        draws.append(statistic(np.concatenate([members[cluster] for cluster in drawn])))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(statistic(np.arange(len(index)))), float(low), float(high), float(np.std(draws, ddof=1)),
                    len(index), len(names))
