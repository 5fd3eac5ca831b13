"""The pictures of a run: one per stage, all scores, and the routing over time."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from clipmoe_vlm.figures import draw_over_updates, save_figure  # noqa: E402
from clipmoe_vlm.intervals import Interval  # noqa: E402

Scores = dict[str, Interval]  # per measure


def plot_stage(file: Path, title: str, rows: list[dict], clusters: dict | None, batch_size: int,
               scores: dict[str, Scores]) -> None:
    """Cluster sizes (if any), the loss, and the scores before and after (if any) of one training, side by side.

    Args:
        rows: the training's lines of `metrics.jsonl`.
        clusters: its `clusters.json`.
        scores: of each model, before and after.
    """
    parts = ["loss"]
    if clusters:
        parts.insert(0, "clusters")
    if scores:
        parts.append("scores")
    height = 3.2 if not scores else max(3.2, 0.6 + 0.42 * len(next(iter(scores.values()))))
    figure, axes = plt.subplots(1, len(parts), figsize=(4.4 * len(parts), height), layout="constrained", squeeze=False)
    panel = dict(zip(parts, axes[0], strict=True))
    figure.suptitle(title)
    if clusters:
        draw_clusters(panel["clusters"], clusters, batch_size)
    draw_loss(panel["loss"], rows)
    if scores:
        draw_scores(panel["scores"], scores)
    save_figure(figure, file)


def draw_clusters(axes, clusters: dict, batch_size: int) -> None:
    sizes = np.sort(clusters["sizes"])[::-1]
    places = np.arange(1, len(sizes) + 1)
    large = sizes >= batch_size
    axes.bar(places[large], sizes[large], width=1.0, color="C0", label="drawn")
    if not large.all():
        axes.bar(places[~large], sizes[~large], width=1.0, color="0.6", label="smaller than a batch: not drawn")
    axes.axhline(batch_size, color="C3", linewidth=1, linestyle="--", label=f"one batch ({batch_size})")
    uneven = bool(sizes[0] > 100 * sizes[-1])
    axes.set(xlabel="cluster, largest first", ylabel="samples" + " (log scale)" * uneven,
             title=f"{len(sizes)} clusters", yscale="log" if uneven else "linear")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def draw_loss(axes, rows: list[dict]) -> None:
    draw_over_updates(axes, [row["step"] for row in rows], [row["contrastive"] for row in rows])
    axes.set(ylabel="contrastive loss (nats)", title=f"{len(rows)} updates")


def draw_scores(axes, scores: dict[str, Scores]) -> None:
    """Grouped horizontal bars in percent with their 95% intervals, a group per measure and a colour per model."""
    measures = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for number, (model, values) in enumerate(scores.items()):
        intervals = [values[measure] for measure in measures]
        means = np.array([100 * i.mean for i in intervals])
        edges = np.array([[100 * (i.mean - i.low) for i in intervals], [100 * (i.high - i.mean) for i in intervals]])
        places = np.arange(len(measures)) + (number - (len(scores) - 1) / 2) * width
        axes.barh(places, means, width, xerr=np.nan_to_num(edges), label=model, capsize=2, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(measures)), measures)
    axes.invert_yaxis()
    axes.set(xlabel="percent right, with 95% intervals", xlim=(0, 100))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def plot_scores(file: Path, scores: dict[str, Scores]) -> None:
    """All models on all measures."""
    bars = len(scores) * len(next(iter(scores.values())))
    figure, axes = plt.subplots(figsize=(7, 1.6 + 0.16 * bars), layout="constrained")
    draw_scores(axes, scores)
    save_figure(figure, file)
