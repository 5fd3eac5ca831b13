"""Draws which expert each patch of a picture went to first, over the picture as the tower saw it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

# Okabe and Ito's colours, which people with any colour vision tell apart; more experts begin again.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def experts_of(row: dict, layer: int) -> np.ndarray:
    """`[rows, columns]`, the index of each patch's first-choice expert in that block."""
    rows, columns = row["grid"]
    return np.array([int(digit, 36) for digit in row["layers"][str(layer)]]).reshape(rows, columns)


def layers_of(row: dict) -> list[int]:
    return [int(layer) for layer in row["layers"]]


def draw(seen: Image.Image, row: dict, layer: int, title: str = "") -> Image.Image:
    """The picture, and beside it the map with a legend that says each expert's share of the patches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    experts = experts_of(row, layer)
    count = row["num_experts"]
    colors = [COLORS[expert % len(COLORS)] for expert in range(count)]
    figure = Figure(figsize=(7, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    plain, mapped = figure.subplots(1, 2)
    extent = (0, seen.width, seen.height, 0)
    for axes in (plain, mapped):
        axes.imshow(seen, extent=extent)
        axes.set_axis_off()
    plain.set_title("as the tower saw it", fontsize="small")
    mapped.imshow(experts, cmap=ListedColormap(colors), vmin=-0.5, vmax=count - 0.5, alpha=0.6, extent=extent,
                  interpolation="nearest")
    mapped.set_title(f"first-choice expert, block {layer}", fontsize="small")
    shares = np.bincount(experts.ravel(), minlength=count) / experts.size
    figure.legend(handles=[Patch(color=color, label=f"expert {expert}: {share:.0%}")
                           for expert, (color, share) in enumerate(zip(colors, shares, strict=True))],
                  loc="outside lower center", ncols=min(count, 4), fontsize="small", frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return Image.open(stream).convert("RGB")
