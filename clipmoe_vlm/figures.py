"""What the programs' figures share. matplotlib is imported by the programs, never by the plugin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipmoe_vlm.runs import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH_FROM = 100  # updates from which on a running mean is drawn over a noisy curve


def draw_over_updates(axes: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    """A curve over the updates of a training, with its running mean if there are many."""
    if len(values) < SMOOTH_FROM:
        axes.plot(steps, values, linewidth=1)
    else:
        width = len(values) // 20
        axes.plot(steps, values, linewidth=0.6, alpha=0.35, label="each update")
        axes.plot(steps[width - 1:], np.convolve(values, np.ones(width) / width, "valid"), color="C0",
                  label=f"mean of the last {width}")
        axes.legend(fontsize="small")
    axes.set_xlabel("update")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def save_figure(figure: Figure, file: Path) -> None:
    """Writes a PNG and forgets the figure."""
    from matplotlib import pyplot

    with atomic_write(file, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)


def plot_routing(file: Path, rows: list[dict], first_layer: dict[str, int]) -> None:
    """Heat maps, layers x updates, of the routers' entropy, their distance from the start if the rows have it, and each
    expert's load.

    Args:
        rows: lines of `routing.jsonl`.
        first_layer: of each tower, the block of its first MoE layer.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    towers = [tower for tower in ("vision", "text") if f"{tower}_load" in rows[0]]
    num_experts = len(rows[0][f"{towers[0]}_load"][0])
    heights = [2.4 + 0.09 * len(rows[0][f"{tower}_load"]) for tower in towers]
    undecided, balanced = math.log(num_experts), 1 / num_experts
    # [records, layers], the load [.., experts]
    entropy, load = ({tower: np.array([row[f"{tower}_{what}"] for row in rows]) for tower in towers}
                     for what in ("entropy", "load"))
    spread = max(np.abs(values - balanced).max() for values in load.values()) + 1e-9
    maps = [("entropy", entropy, {"vmin": 0, "vmax": undecided}, f"nats ({undecided:.2f}: undecided)")]
    if f"{towers[0]}_moved" in rows[0]:
        moved = {tower: 100 * np.array([row[f"{tower}_moved"] for row in rows]) for tower in towers}
        furthest = max(values.max() for values in moved.values()) + 1e-9
        maps.append(("moved from start", moved, {"vmin": 0, "vmax": furthest, "cmap": "magma"},
                     "% of the initial norm"))
    first_load = len(maps)
    maps += [(f"load of expert {expert}", {tower: values[..., expert] for tower, values in load.items()},
              {"vmin": balanced - spread, "vmax": balanced + spread, "cmap": "coolwarm"},
              f"share of choices ({balanced:.2f}: balanced)") for expert in range(num_experts)]
    figure, axes = pyplot.subplots(len(towers), len(maps), figsize=(2.5 * len(maps), sum(heights)), squeeze=False,
                                   height_ratios=heights, layout="constrained", sharex=True)
    edges = [0, *(row["step"] for row in rows)]  # a record stands for the updates since the one before
    for column, (title, values, style, unit) in enumerate(maps):
        for plot, tower in zip(axes[:, column], towers, strict=True):
            layers = first_layer[tower] - 0.5 + np.arange(values[tower].shape[1] + 1)
            image = plot.pcolormesh(edges, layers, values[tower].T, **style)
            plot.set_title(f"{tower}: {title}", fontsize="medium")
            plot.yaxis.get_major_locator().set_params(integer=True)
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[-1, column].set_xlabel("update")
        if column < first_load or column == len(maps) - 1:  # all loads share one scale
            figure.colorbar(image, ax=axes[:, column], label=unit)
    for plot in axes[:, 0]:
        plot.set_ylabel("block")
    save_figure(figure, file)
