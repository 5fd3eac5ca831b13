"""The report's drawings, in Okabe and Ito's colours, which colour-blind people can tell apart."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from demo.report_facts import KIND_NAMES, TOWERS

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
GREY = "#8a8f98"
matplotlib.rcParams.update({
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": "#555", "legend.frameon": False,
    "svg.hashsalt": "report",  # the same ids, so the same file, each time
})


def drawn(figure: Figure, kind: str) -> bytes:
    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(stream, format=kind, dpi=150, bbox_inches="tight", facecolor="white", metadata=metadata)
    return stream.getvalue()


def data_uri(figure: Figure, kind: str = "svg") -> str:
    media = "image/svg+xml" if kind == "svg" else "image/png"
    return f"data:{media};base64," + base64.b64encode(drawn(figure, kind)).decode()


def colour_of(model: dict) -> str:
    """Base grey, CLIP-MoE blue, experts light blue, baselines orange and green, controls pink."""
    key = "expert" if model["key"].startswith("expert_") else model["key"]
    return {"base": GREY, "expert": COLOURS[4], "clipmoe": COLOURS[0], "direct": COLOURS[1],
            "sparse_upcycling": COLOURS[2], "random_routers": COLOURS[3], "uniform_average": COLOURS[3]}[key]


def bars(axes, positions, values: list[tuple], colours: list[str], width: float = 0.8, unit: float = 100) -> None:
    """Bars with the 95% interval as a thin line; `values` are (mean, low, high)."""
    heights = [unit * value[0] for value in values]
    axes.bar(positions, heights, width, color=colours, edgecolor="white", linewidth=0.5)
    for position, value in zip(positions, values, strict=True):
        if value[1] is not None:
            axes.plot([position, position], [unit * value[1], unit * value[2]], color="#222", linewidth=1.3)


def hard_captions(facts: dict) -> Figure:
    """One panel per kind of detail, one bar per model."""
    kinds, models = facts["kinds"], facts["models"]
    figure = Figure(figsize=(11, 4.2))
    for number, (axes, kind) in enumerate(zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds,
                                              strict=True)):
        bars(axes, range(len(models)), [model["hard"][kind] for model in models],
             [colour_of(model) for model in models])
        axes.axhline(50, color="#222", linewidth=0.8, linestyle=":")
        axes.set_title(KIND_NAMES[kind])
        axes.set_xticks(range(len(models)), [model["title"] for model in models], rotation=90, fontsize=8)
        axes.set_ylim(0, 100)
        if number == 0:
            axes.set_ylabel("right, %")
    figure.tight_layout()
    return figure


def result(facts: dict) -> Figure:
    """The README's picture: hard captions of base, experts and CLIP-MoE by kind; POPE and MME of both VLMs."""
    chosen = [model for model in facts["models"]
              if model["key"] in ("base", "clipmoe") or model["key"].startswith("expert_")]
    kinds = facts["kinds"]
    figure = Figure(figsize=(11, 3.6))
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    width = 0.8 / len(chosen)
    experts = 0
    for number, model in enumerate(chosen):
        colour = colour_of(model)
        if model["key"].startswith("expert_"):
            colour = ["#9fd3f3", "#7bc3ee", "#56B4E9"][experts % 3]
            experts += 1
        bars(left, [index + (number - (len(chosen) - 1) / 2) * width for index in range(len(kinds))],
             [model["hard"][kind] for kind in kinds], [colour] * len(kinds), width)
        left.bar([0], [0], color=colour, label=model["title"])
    left.axhline(50, color="#222", linewidth=0.8, linestyle=":")
    left.set_xticks(range(len(kinds)), [KIND_NAMES[kind] for kind in kinds])
    left.set_ylim(0, 100)
    left.set_ylabel("right, %")
    left.set_title("CLIP: hard captions right (dotted: a coin)")
    left.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    rows = [row for row in facts["vlm_rows"] if row["suite"] == "POPE" and row["key"] != "all"]
    total = next(row for row in facts["vlm_rows"] if row["key"] == "total")
    share = 100 / sum(200 for row in facts["vlm_rows"] if row["suite"] == "MME" and row["key"] != "total")
    for offset, (tower, title) in enumerate(TOWERS.items()):
        values = [row["values"][tower] for row in rows]
        values.append(tuple(None if x is None else share * x for x in total["values"][tower]))
        colour = (GREY, COLOURS[0])[offset]
        bars(right, [index + (offset - 0.5) * 0.4 for index in range(len(values))], values, [colour] * len(values),
             width=0.4, unit=1)
        right.bar([0], [0], color=colour, label=title)
    for index in range(len(rows)):
        right.plot([index - 0.4, index + 0.4], [50, 50], color="#222", linewidth=0.8, linestyle=":")
    right.plot([len(rows) - 0.4, len(rows) + 0.4], [37.5, 37.5], color="#222", linewidth=0.8, linestyle=":")
    right.set_xticks(range(len(rows) + 1), [f"POPE\n{row['name']}" for row in rows] + ["MME\n% of points"], fontsize=8)
    right.set_ylim(0, 100)
    right.set_title("VLM: questions right, %")
    right.legend(ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    figure.tight_layout()
    return figure


def losses(panels: dict[str, dict[str, list]]) -> Figure:
    figure = Figure(figsize=(11, 3.2))
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (name, (steps, values)) in enumerate(curves.items()):
            window = max(1, len(values) // 30)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1:], smooth, color=COLOURS[number % len(COLOURS)], linewidth=1.4, label=name)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def expert_load(routing: dict) -> Figure:
    """Share of routed tokens per expert, one stacked bar per MoE layer, both towers."""
    figure = Figure(figsize=(11, 2.8))
    towers = (("vision", "image tower"), ("text", "text tower"))
    for axes, (tower, title) in zip(figure.subplots(1, 2), towers, strict=True):
        load = np.array(routing[f"{tower}_load"])
        left = np.zeros(len(load))
        for expert in range(load.shape[1]):
            axes.barh(range(len(load)), load[:, expert], left=left, color=COLOURS[expert % len(COLOURS)],
                      edgecolor="white", label="0 (base)" if expert == 0 else str(expert))
            left += load[:, expert]
        axes.set_yticks(range(len(load)), [f"layer {index}" for index in range(len(load))])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_title(title)
        axes.set_xlabel("share of the routed tokens")
    axes.legend(title="expert", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.tight_layout()
    return figure


def cluster_sizes(stages: list[dict]) -> Figure:
    """Clusters of each stage, largest first."""
    figure = Figure(figsize=(11, 2.8))
    for axes, stage in zip(figure.subplots(1, max(1, len(stages)), squeeze=False)[0], stages, strict=False):
        axes.bar(range(len(stage["sizes"])), stage["sizes"], color=COLOURS[0])
        axes.set_title(f"{stage['stage']}: {len(stage['sizes'])} clusters")
        axes.set_ylabel("samples")
        axes.set_xticks([])
    figure.tight_layout()
    return figure


def routing_maps(maps: dict) -> Figure:
    """A row per picture: the picture, then each chosen layer's first-choice expert per patch over it."""
    images, layers = maps["images"], maps["layers"]
    figure = Figure(figsize=(1.75 * (1 + len(layers)), 1.75 * len(images)))
    grid = figure.subplots(len(images), 1 + len(layers), squeeze=False)
    colours = ListedColormap([COLOURS[expert % len(COLOURS)] for expert in range(maps["experts"])])
    for row, image in zip(range(len(images)), images, strict=True):
        grid[row, 0].imshow(image)
        grid[row, 0].set_title("picture" if row == 0 else "", loc="center")
        for column, (layer, experts) in enumerate(layers.items(), 1):
            axes = grid[row, column]
            axes.imshow(image, extent=(0, 1, 0, 1), alpha=0.45)
            axes.imshow(experts[row], cmap=colours, vmin=-0.5, vmax=maps["experts"] - 0.5, extent=(0, 1, 0, 1),
                        alpha=0.55, interpolation="nearest")
            axes.set_title(f"layer {layer}" if row == 0 else "", loc="center")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    patches = [Patch(color=COLOURS[expert % len(COLOURS)], label=f"expert {expert}" + " (base)" * (expert == 0))
               for expert in range(maps["experts"])]
    figure.legend(handles=patches, ncols=maps["experts"], loc="lower center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure
