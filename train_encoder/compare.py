"""Two models on the same data: paired differences with 95% intervals, and in red where a model loses to its base."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console

from clipmoe_vlm.intervals import Interval, cluster_interval, paired_interval
from clipmoe_vlm.runs import UserError

from .zero_shot import TOP

SHOWN_KINDS = 10  # of more kinds of hard captions only the mean is shown
Outcomes = dict[str, tuple[np.ndarray, list]]


def outcomes(result: dict) -> Outcomes:
    """Per measure of a result (see zero_shot.py) the values whose mean it is, and each one's cluster: its picture."""
    found: Outcomes = {}
    if scores := result.get("retrieval"):
        for way, name, clusters in (("image_to_text", "image to text", range(scores["n_images"])),
                                    ("text_to_image", "text to image", scores["owners"])):
            ranks = np.array(scores[f"{way}_ranks"])
            found |= {f"{name} R@{k}": ((ranks < k).astype(float), list(clusters)) for k in TOP}
    if scores := result.get("classification"):
        ranks, pictures = np.array(scores["ranks"]), list(range(scores["n_images"]))
        found["top-1"] = ((ranks < 1).astype(float), pictures)
        if scores["top_5"] is not None:
            found["top-5"] = ((ranks < 5).astype(float), pictures)
        found["mean per class"] = (mean_of_groups(ranks < 1, scores["labels"]), pictures)
    if items := result.get("hard_items"):
        correct = np.array([item["correct"] for item in items], float)
        kinds, images = (np.array([item[key] for item in items]) for key in ("kind", "image"))
        names = np.unique(kinds).tolist()
        if len(names) <= SHOWN_KINDS:
            found |= {kind: (correct[kinds == kind], images[kinds == kind].tolist()) for kind in names}
        else:
            found["mean of the kinds"] = (mean_of_groups(correct, kinds), images.tolist())
        if len(names) > 1:
            found["all rows"] = (correct, images.tolist())
    return found


def mean_of_groups(values: Sequence, groups: Sequence) -> np.ndarray:
    """Values whose mean is the mean of the groups' means, and whose spread is that mean's: each is that mean plus its
    own part in it (its distance from its group's mean, weighted as if all groups were of one size)."""
    names, index = np.unique(groups, return_inverse=True)
    size = np.bincount(index)
    means = np.bincount(index, weights=values) / size
    return means.mean() + (values - means[index]) * len(index) / (len(names) * size[index])


def intervals(result: dict) -> dict[str, Interval]:
    """Each measure of a result with its 95% interval, clustered by picture."""
    return {name: cluster_interval(values, clusters) for name, (values, clusters) in outcomes(result).items()}


def differences(base: dict, result: dict) -> dict[str, Interval]:
    """`result` minus `base` per measure, paired by picture, caption or question.

    Raises:
        UserError: they are not results on the same data.
    """
    ours, theirs = outcomes(result), outcomes(base)
    if {name: clusters for name, (_, clusters) in ours.items()} != {name: c for name, (_, c) in theirs.items()}:
        raise UserError("the two models were not measured on the same pictures and texts (did a file change, or a "
                        "picture become unreadable?); remove both results and measure again")
    return {name: paired_interval(values, theirs[name][0], clusters) for name, (values, clusters) in ours.items()}


def headline(scores: dict[str, Interval]) -> dict[str, Interval]:
    """The measures that sentences and pictures are about; R@5, R@10 and top-5 are left to the tables."""
    return {measure: value for measure, value in scores.items() if not measure.endswith(("R@5", "R@10", "top-5"))}


def losses(changes: dict[str, Interval], name: str = "This model", base: str = "its base") -> str | None:
    """The sentence that says on which headline measures a model is below its base; None if it is on none."""
    lost = [f"{measure} ({100 * change.mean:+.1f} points{'' if change.high < 0 else ', within chance'})"
            for measure, change in changes.items()
            if is_lower(change) and measure in headline(changes)]
    return f"{name} scores lower than {base} on: {'; '.join(lost)}." if lost else None


def caution(sentence: str) -> list[str]:
    """A red box, where Markdown is rendered as on GitHub."""
    return ["> [!CAUTION]", f"> 🔴 {sentence}", ""]


def print_red(sentence: str) -> None:
    """In the terminal; plain text where the output goes to a file."""
    Console(soft_wrap=True).print(sentence, style="bold red", markup=False, highlight=False)


def comparison(base: dict, result: dict) -> list[str]:
    """Markdown: what a model gained and lost against its base; in a red box first, what it lost."""
    changes = differences(base, result)
    lines = []
    if sentence := losses(changes):
        lines += caution(sentence)
    for measure, change in changes.items():
        lines.append(f"- {measure}: {100 * change.mean:+.1f} points ({100 * change.low:+.1f} to "
                     f"{100 * change.high:+.1f}): {verdict(change)}")
    return lines


def is_lower(change: Interval) -> bool:
    """Whether a difference is below zero; that of two equal means of groups need not be exactly zero."""
    return change.mean < -1e-9


def verdict(change: Interval) -> str:
    """What a difference to the base shows, in words."""
    if change.low > 0:
        return "better than its base"
    return "🔴 **worse than its base**" if change.high < 0 else "no clear difference"
