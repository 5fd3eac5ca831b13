"""Intervals: coverage on simulated questions that share pictures, and agreement with textbook formulas."""

import math

import numpy as np
import pytest
from scipy import stats

from clipmoe_vlm.intervals import cluster_interval, paired_interval

PICTURES, PER_PICTURE, RUNS = 60, 6, 400


def questions(generator: np.random.Generator, mean: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """0/1 answers of which those about one picture are alike: each picture has its own chance of a right answer."""
    chance = generator.beta(2 * mean, 2 * (1 - mean), PICTURES)
    return ((generator.random((PICTURES, PER_PICTURE)) < chance[:, None]).astype(float).ravel(),
            np.repeat(np.arange(PICTURES), PER_PICTURE))


def coverage(interval_of, truth: float, seed: int = 0, runs: int = RUNS) -> float:
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(runs):
        interval = interval_of(generator)
        hits += interval.low <= truth <= interval.high
    return hits / runs


def test_clustered_interval_covers_and_the_naive_one_does_not():
    """95% of 400 runs, give or take three standard errors (0.033)."""
    assert 0.917 < coverage(lambda generator: cluster_interval(*questions(generator)), 0.7) < 0.983
    assert coverage(lambda generator: cluster_interval(questions(generator)[0]), 0.7) < 0.85


def test_paired_interval_covers_and_its_p_value_is_uniform():
    p_values = []

    def interval(generator):
        a, clusters = questions(generator)
        b = np.where(generator.random(len(a)) < 0.2, 1 - a, a)  # b differs from a on a fifth of the questions
        difference = b.mean() - a.mean(), paired_interval(b, a, clusters)
        assert math.isclose(difference[0], difference[1].mean, abs_tol=1e-12)
        return difference[1]

    truth = 0.2 * (0.3 - 0.7)
    assert 0.917 < coverage(interval, truth) < 0.983

    def null(generator):
        a, clusters = questions(generator)
        flip = generator.random(len(a)) < 0.2
        b = np.where(flip, (generator.random(len(a)) < 0.5), a)
        a = np.where(flip, (generator.random(len(a)) < 0.5), a)
        result = paired_interval(b, a, clusters)
        p_values.append(result.p_value)
        return result

    coverage(null, 0.0)
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.083


def test_without_clusters_it_is_the_textbook_t_interval():
    values = np.random.default_rng(0).normal(size=30)
    ours = cluster_interval(values)
    low, high = stats.t.interval(0.95, 29, values.mean(), values.std(ddof=1) / math.sqrt(30))
    assert ours.low == pytest.approx(low) and ours.high == pytest.approx(high) and ours.clusters == 30
    test = stats.ttest_rel(values, values[::-1] + 0.1)
    paired = paired_interval(values, values[::-1] + 0.1)
    assert paired.p_value == pytest.approx(test.pvalue)


def test_equal_clusters_are_the_t_interval_of_their_means():
    values, clusters = questions(np.random.default_rng(0))
    ours, by_mean = cluster_interval(values, clusters), cluster_interval(values.reshape(PICTURES, -1).mean(1))
    assert ours.low == pytest.approx(by_mean.low) and ours.n == 360 and ours.clusters == 60
    copies = cluster_interval(np.repeat(values, 3), np.repeat(clusters, 3))  # asking thrice tells nothing new
    assert copies.low == pytest.approx(ours.low)


def test_names_are_as_good_as_numbers_and_order_does_not_matter():
    values, clusters = questions(np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(len(values))
    names = [f"{clusters[index]}.png" for index in order]
    assert cluster_interval(values[order], names).high == pytest.approx(cluster_interval(values, clusters).high)


def test_edges():
    alone = cluster_interval([1.0, 0.0], ["a", "a"])
    assert alone.mean == 0.5 and math.isnan(alone.low) and alone.clusters == 1
    same = paired_interval([1, 0, 1], [1, 0, 1])
    assert same.mean == same.low == same.high == 0 and same.p_value == 1
    assert paired_interval([1, 1, 1], [0, 0, 0]).p_value == 0.25  # of three coins all alike
    almost = paired_interval([0.1, 0.3, 0.7], [0.0, 0.2, 0.6])  # not even but for rounding
    assert almost.p_value == 0.25 and almost.low == almost.high
    for call in (lambda: cluster_interval([]), lambda: cluster_interval([1.0], ["a", "b"]),
                 lambda: paired_interval([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError):
            call()
