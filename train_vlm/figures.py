"""The curves of a run in one picture."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from clipmoe_vlm.figures import draw_over_updates, save_figure  # noqa: E402


def plot_curves(file: Path, title: str, updates: list[dict], measurements: list[dict]) -> None:
    """Loss with the held-out loss, learning rates, gradient norm, and, where there are any, the routers' losses and the
    suites' scores.

    Args:
        updates, measurements: the two kinds of lines in `metrics.jsonl`.
    """
    panels = [partial(draw_loss, measurements=measurements), draw_rates, draw_gradient]
    panels += [draw_router_loss] if any(row["aux_loss"] for row in updates) else []
    scored = [row for row in measurements if "evaluation" in row]
    suites = dict.fromkeys(name.split("/")[0] for row in scored for name in row["evaluation"])
    panels += [partial(draw_scores, suite=suite, scored=scored) for suite in suites]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 3 * rows), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for draw, panel in zip(panels, axes.flat, strict=False):
        draw(panel, updates)
    for panel in axes.flat[len(panels):]:
        panel.axis("off")
    save_figure(figure, file)


def draw_loss(axes, updates: list[dict], measurements: list[dict]) -> None:
    draw_over_updates(axes, [row["step"] for row in updates], [row["lm_loss"] for row in updates])
    held_out = [row for row in measurements if "validation_loss" in row]
    if held_out:
        axes.plot([row["step"] for row in held_out], [row["validation_loss"] for row in held_out], "o-", color="C3",
                  markersize=3, label="held-out samples")
        axes.legend(fontsize="small")
    axes.set(ylabel="nats per label token", title="language-model loss")


def draw_rates(axes, updates: list[dict]) -> None:
    parts: dict[tuple[float, ...], list[str]] = {}  # those with the same rates share a curve
    for name in updates[0]["lr"]:
        parts.setdefault(tuple(row["lr"][name] for row in updates), []).append(name)
    for rates, names in parts.items():
        axes.plot([row["step"] for row in updates], rates, label=", ".join(names))
    axes.set(xlabel="update", title="learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    finish_axes(axes)


def draw_gradient(axes, updates: list[dict]) -> None:
    draw_over_updates(axes, [row["step"] for row in updates], [row["grad_norm"] for row in updates])
    axes.set(title="gradient norm before clipping", yscale="log")


def draw_router_loss(axes, updates: list[dict]) -> None:
    seen = [row for row in updates if row["pictures"]]
    draw_over_updates(axes, [row["step"] for row in seen], [row["aux_loss"] for row in seen])
    axes.set(title="balance loss of the routers, batches with pictures")


def draw_scores(axes, _updates: list[dict], suite: str, scored: list[dict]) -> None:
    names = dict.fromkeys(name for row in scored for name in row["evaluation"] if name.split("/")[0] == suite)
    for name in names:
        axes.plot([row["step"] for row in scored], [row["evaluation"].get(name, math.nan) for row in scored], "o-",
                  markersize=3, label=name.removeprefix(f"{suite}/"))
    axes.set(xlabel="update", title=f"score: {suite}")
    finish_axes(axes)


def finish_axes(axes) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
