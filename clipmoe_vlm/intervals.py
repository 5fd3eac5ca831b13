"""95% intervals for figures over questions that share pictures, for sums of them, and for paired differences.

Questions about one picture are not independent: standard errors are cluster-robust (Liang and Zeger 1986, with the
small-sample factor G / (G - 1)), the quantile is Student's t with G - 1 degrees of freedom, G being the number of
clusters. A figure that is no mean (F1) goes by its linearisation: each cluster's part of the error to first order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Estimate:
    """A figure and where its error comes from.

    Args:
        value: the figure.
        errors: cluster -> its part of `value - truth`; the squares add up to the squared standard error.
        n: how many questions it is over.
        strata: how many independent samples it is made of; with each the t-quantile loses a degree of freedom.
        top: the figure goes from 0 to here; None for differences.
    """

    value: float
    errors: dict[str, float]
    n: int
    strata: int = 1
    top: float | None = None

    def interval(self) -> Interval:
        """NaN with a single cluster, which says nothing about the spread.

        A figure between 0 and `top` gets Wilson's interval with the number of independent questions that would have its
        standard error (as survey statistics do: Korn and Graubard 1998): near the ends the plain t-interval covers too
        little, goes beyond them, and vanishes at them. Where the standard error is zero, each cluster counts as one.
        """
        from scipy import stats

        clusters = len(self.errors)
        if clusters < 2 or math.isnan(self.value):
            nan = float("nan")
            return Interval(self.value, nan, nan, nan, self.n, clusters, None if self.top is not None else nan)
        error = math.sqrt(sum(part * part for part in self.errors.values()))
        if error < 1e-12 * abs(self.value):  # rounding
            error = 0.0
        freedom = max(1, clusters - self.strata)
        quantile = float(stats.t.ppf(0.975, freedom))
        if self.top is None:
            half = quantile * error
            if error:
                p_value = float(2 * stats.t.sf(abs(self.value) / error, freedom))
            else:  # all clusters differ alike: the sign test
                p_value = 2.0 ** (1 - clusters) if self.value else 1.0
            return Interval(self.value, self.value - half, self.value + half, error, self.n, clusters, p_value)
        share, square = self.value / self.top, quantile * quantile
        size = share * (1 - share) / (error / self.top) ** 2 if error else clusters
        middle = (share + square / (2 * size)) / (1 + square / size)
        half = quantile * math.sqrt(share * (1 - share) / size + square / (4 * size * size)) / (1 + square / size)
        return Interval(self.value, self.top * max(0.0, middle - half), self.top * min(1.0, middle + half), error,
                        self.n, clusters)


def mean_of(values: Sequence[float], clusters: Sequence | None = None, top: float | None = None) -> Estimate:
    """The mean of `values`; `clusters` gives each value's cluster (default: all independent).

    Raises:
        ValueError: no values, or not one cluster per value.
    """
    return ratio_of(values, np.ones(len(values)), clusters, top)


def ratio_of(numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence | None = None,
             top: float | None = None) -> Estimate:
    """The ratio of two sums over the same questions, linearised (Cochran 1977, section 6.3); 0 if the lower is 0.

    F1 is one: twice the true positives over twice the true positives plus false positives and false negatives.

    Raises:
        ValueError: no values, or not one cluster per value.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (numerators, denominators))
    if len(x) == 0:
        raise ValueError("an interval needs at least one value")
    if clusters is None:
        clusters = np.arange(len(x))
    if len(clusters) != len(x):
        raise ValueError(f"{len(x)} values but {len(clusters)} cluster names")
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    count, total = len(names), float(y.sum())
    value = float(x.sum()) / total if total else 0.0
    parts = np.bincount(index, weights=x - value * y, minlength=count) / (total or 1.0)
    if count > 1:
        parts *= math.sqrt(count / (count - 1))
    return Estimate(value, dict(zip(names.tolist(), parts.tolist(), strict=True)), len(x), top=top)


def combined(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """The weighted sum of figures, whether their clusters are shared (POPE's three sets) or not (MME's subtasks).

    With a negative weight it is a difference: of two models on the same questions, a paired one.
    """
    errors: dict[str, float] = {}
    for estimate, weight in zip(estimates, weights, strict=True):
        for name, part in estimate.errors.items():
            errors[name] = errors.get(name, 0.0) + weight * part
    is_sum = all(weight >= 0 and one.top is not None for one, weight in zip(estimates, weights, strict=True))
    value = sum(weight * one.value for one, weight in zip(estimates, weights, strict=True))
    if any(len(one.errors) < 2 for one in estimates):  # of one part the spread is not known
        errors = dict(list(errors.items())[:1])
    return Estimate(value, errors, sum(one.n for one in estimates), sum(one.strata for one in estimates),
                    sum(weight * one.top for one, weight in zip(estimates, weights, strict=True)) if is_sum else None)


def paired(a: Estimate, b: Estimate) -> Estimate:
    """`a - b`, two models' figures over the same questions."""
    both = combined([a, b], [1.0, -1.0])
    return Estimate(both.value, both.errors, a.n, a.strata)


def cluster_interval(values: Sequence[float], clusters: Sequence | None = None) -> Interval:
    """Mean of `values` with its 95% interval, see `mean_of`; it may go beyond the values' range."""
    return Interval(**{**mean_of(values, clusters).interval().__dict__, "p_value": None})


def paired_interval(a: Sequence[float], b: Sequence[float], clusters: Sequence | None = None) -> Interval:
    """Mean of `a - b` on the same questions, with its 95% interval and a two-sided t-test's p-value."""
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs the same questions: {len(a)} against {len(b)}")
    return mean_of(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), clusters).interval()


def pooled_difference(a: Sequence[Estimate], b: Sequence[Estimate]) -> Interval:
    """Mean over the seeds of `a` minus that of `b`, of models trained with several seeds and asked the same questions.

    Variance of seeds (each side's own, Welch 1947) plus that of pictures; what a seed does to a single picture is in
    both and is counted once (two-way random effects). Degrees of freedom by Satterthwaite 1946: with two or three
    seeds mostly theirs, so that the interval is wide. Not less than either variance alone.

    Raises:
        ValueError: a side with fewer than two seeds.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("pooling needs at least two seeds on each side")
    from scipy import stats

    names = sorted({name for one in (*a, *b) for name in one.errors}, key=str)
    sides = [np.array([[one.errors.get(name, 0.0) for name in names] for one in side]) for side in (a, b)]
    values = [np.array([one.value for one in side]) for side in (a, b)]
    difference = float(values[0].mean() - values[1].mean())
    pictures = float(np.square(sides[0].mean(0) - sides[1].mean(0)).sum())
    seeds = [float(one.var(ddof=1)) / len(one) for one in values]
    shared = sum(float(np.square(one - one.mean(0)).sum()) / (len(one) - 1) / len(one) for one in sides)
    variance = max(pictures + sum(seeds) - shared, pictures, sum(seeds))
    freedoms = [max(1, len(names) - a[0].strata), len(a) - 1, len(b) - 1]
    below = sum(part * part / freedom for part, freedom in zip((pictures, *seeds), freedoms, strict=True))
    freedom = variance * variance / below if below else 1.0
    error = math.sqrt(variance)
    half = float(stats.t.ppf(0.975, freedom)) * error
    if error:
        p_value = float(2 * stats.t.sf(abs(difference) / error, freedom))
    else:  # nothing varies, so that nothing is known of chance
        p_value = 1.0 if difference == 0 else float("nan")
    return Interval(difference, difference - half, difference + half, error, a[0].n, len(names), p_value)
