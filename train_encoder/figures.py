"""The pictures of a run: one per stage, all scores, and the routing over time."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from clipmoe_vlm.intervals import Interval  # noqa: E402
from clipmoe_vlm.runs import atomic_write  # noqa: E402

Scores = dict[str, Interval]  # per measure
SMOOTH_FROM = 100  # updates from which on a running mean is drawn over the loss


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
    save(figure, file)


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
    steps, loss = [row["step"] for row in rows], np.array([row["contrastive"] for row in rows])
    if len(loss) < SMOOTH_FROM:
        axes.plot(steps, loss, linewidth=1)
    else:
        width = len(loss) // 20
        axes.plot(steps, loss, linewidth=0.6, alpha=0.35, label="each update")
        axes.plot(steps[width - 1:], np.convolve(loss, np.ones(width) / width, "valid"), color="C0",
                  label=f"mean of the last {width}")
        axes.legend(fontsize="small")
    axes.set(xlabel="update", ylabel="contrastive loss (nats)", title=f"{len(rows)} updates")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


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
    save(figure, file)


def plot_routing(file: Path, rows: list[dict], first_layer: dict[str, int]) -> None:
    """Heat maps, layers x updates, of the routers' entropy, their distance from the start, and each expert's load.

    Args:
        rows: lines of `routing.jsonl`.
        first_layer: of each tower, the block of its first MoE layer.
    """
    towers = [tower for tower in ("vision", "text") if f"{tower}_load" in rows[0]]
    num_experts = len(rows[0][f"{towers[0]}_load"][0])
    heights = [1.8 + 0.09 * len(rows[0][f"{tower}_load"]) for tower in towers]
    figure, axes = plt.subplots(len(towers), 2 + num_experts, figsize=(2.5 * (2 + num_experts), sum(heights)),
                                height_ratios=heights, layout="constrained", squeeze=False, sharex=True)
    undecided, balanced = math.log(num_experts), 1 / num_experts
    entropy, moved, load = ({tower: np.array([row[f"{tower}_{what}"] for row in rows]) for tower in towers}
                            for what in ("entropy", "moved", "load"))  # [records, layers], the load [.., experts]
    furthest = max(100 * values.max() for values in moved.values()) + 1e-9
    spread = max(np.abs(values - balanced).max() for values in load.values()) + 1e-9
    maps = [("entropy", entropy, {"vmin": 0, "vmax": undecided}, f"nats ({undecided:.2f}: undecided)"),
            ("moved from start", {tower: 100 * values for tower, values in moved.items()},
             {"vmin": 0, "vmax": furthest, "cmap": "magma"}, "% of the initial norm")]
    maps += [(f"load of expert {expert}", {tower: values[..., expert] for tower, values in load.items()},
              {"vmin": balanced - spread, "vmax": balanced + spread, "cmap": "coolwarm"},
              f"share of choices ({balanced:.2f}: balanced)") for expert in range(num_experts)]
    edges = [0, *(row["step"] for row in rows)]  # a record stands for the updates since the one before
    for column, (title, values, style, unit) in enumerate(maps):
        for plot, tower in zip(axes[:, column], towers, strict=True):
            layers = first_layer[tower] - 0.5 + np.arange(values[tower].shape[1] + 1)
            image = plot.pcolormesh(edges, layers, values[tower].T, **style)
            plot.set_title(f"{tower}: {title}", fontsize="medium")
            plot.yaxis.get_major_locator().set_params(integer=True)
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[-1, column].set_xlabel("update")
        if column in (0, 1, len(maps) - 1):  # all loads share one scale
            figure.colorbar(image, ax=axes[:, column], label=unit)
    for plot in axes[:, 0]:
        plot.set_ylabel("block")
    save(figure, file)


def save(figure, file: Path) -> None:
    with atomic_write(file, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
