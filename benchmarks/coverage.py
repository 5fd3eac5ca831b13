"""How often the 95% intervals of eval_vlm hold the truth, in simulated evaluations.

    python -m benchmarks.coverage [docs/statistics.md]

Answers about one picture are alike: each picture has its own chance of a right answer. With a file, what stands
between its marks is written anew.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.document import write_results
from clipmoe_vlm.intervals import Estimate, Interval, combined, mean_of, paired, pooled_difference, ratio_of
from clipmoe_vlm.runs import UserError, fail, progress

MARKS = ("<!-- coverage -->", "<!-- end of coverage -->")
Draw = Callable[[np.random.Generator], tuple[Interval, float]]  # an interval and what it should hold


@dataclass(frozen=True)
class Case:
    words: str
    draw: Draw
    tested: bool = True  # also in the tests


def answers(generator: np.random.Generator, pictures: int, each: int, mean: float) -> np.ndarray:
    """`[pictures, each]` of 0 and 1; the pictures' chances are beta(2 mean, 2 (1 - mean)): a third of the variance."""
    chance = generator.beta(2 * mean, 2 * (1 - mean), pictures)
    return (generator.random((pictures, each)) < chance[:, None]).astype(float)


def mean_case(pictures: int, mean: float) -> Draw:
    names = np.repeat(np.arange(pictures), 6)
    return lambda generator: (mean_of(answers(generator, pictures, 6, mean).ravel(), names, 1.0).interval(), mean)


# --- POPE ----------------------------------------------------------------------------------------------------------

LABEL = np.tile([True, False], 3)


def pope_sets(generator: np.random.Generator, pictures: int) -> list[tuple[Estimate, Estimate]]:
    """Accuracy and F1 of three sets about the same pictures, with 6 questions a picture in each."""
    easy = generator.normal(0, 0.7, pictures)
    names = np.repeat(np.arange(pictures), 6)
    sets = []
    for harder in (0.0, 0.4, 0.8):
        odds = np.where(LABEL, 1.7, 2.2 - harder) + easy[:, None]
        right = generator.random((pictures, 6)) < 1 / (1 + np.exp(-odds))
        yes = right == LABEL
        hits, wrong = 2.0 * (yes & LABEL), (~right).astype(float)  # false positives and false negatives
        sets.append((mean_of(right.ravel().astype(float), names, 1.0),
                     ratio_of(hits.ravel(), (hits + wrong).ravel(), names, 1.0)))
    return sets


POPE_TRUTH = pope_sets(np.random.default_rng(0), 400_000)


def pope_case(pictures: int, figure: int, mean: bool) -> Draw:
    def figures(sets: list[tuple[Estimate, Estimate]]) -> Estimate:
        return combined([one[figure] for one in sets], [1 / 3] * 3) if mean else sets[0][figure]

    truth = figures(POPE_TRUTH).value
    return lambda generator: (figures(pope_sets(generator, pictures)).interval(), truth)


# --- MME -----------------------------------------------------------------------------------------------------------


def mme_tasks(generator: np.random.Generator, pictures: int, mean: float, tasks: int) -> list[Estimate]:
    found = []
    for task in range(tasks):
        both = answers(generator, pictures, 2, mean)
        found.append(mean_of(50 * both.sum(1) + 100 * both.all(1), np.arange(pictures) + task * pictures, 200.0))
    return found


def mme_case(pictures: int, mean: float, tasks: int) -> Draw:
    # beta(2m, 2(1-m)): E[p] = m, E[p^2] = m (2m + 1) / 3
    truth = tasks * (100 * mean + 100 * mean * (2 * mean + 1) / 3)

    def draw(generator: np.random.Generator) -> tuple[Interval, float]:
        parts = mme_tasks(generator, pictures, mean, tasks)
        return combined(parts, [1.0] * tasks).interval(), truth

    return draw


# --- two models ----------------------------------------------------------------------------------------------------


def paired_case(pictures: int, changed: float) -> Draw:
    """Model b answers a share of the questions anew, with a chance of 0.6 where model a had 0.8 on the average."""
    names = np.repeat(np.arange(pictures), 6)

    def draw(generator: np.random.Generator) -> tuple[Interval, float]:
        a = answers(generator, pictures, 6, 0.8)
        b = np.where(generator.random(a.shape) < changed, generator.random(a.shape) < 0.6, a)
        return paired(*(mean_of(one.ravel(), names, 1.0) for one in (b, a))).interval(), changed * (0.6 - 0.8)

    return draw


def seeds_case(seeds: int, pictures: int, of_seed: float, of_both: float) -> Draw:
    """Standard deviations: of a seed's effect on the score, and of what it does to a single picture."""
    names = np.repeat(np.arange(pictures), 6)

    def draw(generator: np.random.Generator) -> tuple[Interval, float]:
        easy, change = generator.normal(0, 0.2, (pictures, 1)), generator.normal(0, 0.1, (pictures, 1))
        sides = [[mean_of((easy + extra + generator.normal(0, of_seed) + generator.normal(0, of_both, (pictures, 1))
                           + generator.normal(0, 0.3, (pictures, 6))).ravel(), names) for _ in range(seeds)]
                 for extra in (0.0, change)]
        return pooled_difference(sides[1], sides[0]), 0.0

    return draw


CASES = {
    **{f"accuracy, {pictures} pictures, {mean:.0%} right": Case("6 questions a picture", mean_case(pictures, mean),
                                                                (pictures, mean) in ((20, 0.85), (100, 0.5)))
       for pictures in (20, 100, 500) for mean in (0.5, 0.85, 0.95, 0.98)},
    **{f"POPE {name}, {pictures} pictures": Case("sets about the same pictures", pope_case(pictures, figure, mean),
                                                 pictures == 100 and figure == 1)
       for pictures in (20, 100, 500) for name, figure, mean in (("F1", 1, False), ("mean F1", 1, True),
                                                                 ("mean accuracy", 0, True))},
    **{f"MME {'subtask' if tasks == 1 else 'sum of ten'}, {pictures} pictures each, {mean:.0%} right": Case(
        "2 questions a picture", mme_case(pictures, mean, tasks), pictures == 30 and mean == 0.9)
       for tasks in (1, 10) for pictures in (20, 30, 150) for mean in (0.6, 0.9)},
    **{f"paired difference, {pictures} pictures, {changed:.0%} answered anew": Case(
        "6 questions a picture", paired_case(pictures, changed), (pictures, changed) == (100, 0.2))
       for pictures in (20, 100, 500) for changed in (0.05, 0.2)},
    **{f"{seeds} + {seeds} seeds, {pictures} pictures, {words}": Case(
        "difference of the means", seeds_case(seeds, pictures, of_seed, of_both), (seeds, pictures) == (3, 100))
       for seeds in (2, 3, 5) for pictures in (100, 500)
       for words, of_seed, of_both in (("seeds matter", 0.03, 0.1), ("seeds only flip answers", 0.0, 0.2))},
}


def coverage(name: str, runs: int) -> float:
    """The share of `runs` simulated evaluations whose interval holds the truth."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    held = 0
    for _ in range(runs):
        interval, truth = CASES[name].draw(generator)
        held += interval.low <= truth <= interval.high
    return held / runs


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise UserError("usage: python -m benchmarks.coverage [docs/statistics.md]")
    runs = 4000
    lines = ["| figure | | interval holds the truth, % |", "|---|---|---|"]
    lines += [f"| {name} | {case.words} | {100 * coverage(name, runs):.1f} |"
              for name, case in progress(CASES.items(), description="simulations", total=len(CASES))]
    text = "\n".join([f"`python -m benchmarks.coverage`, {runs} simulated evaluations a line (the share is known to "
                      "+-0.7):", "", *lines])
    print(text)
    if arguments:
        write_results(Path(arguments[0]), MARKS, text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
