"""`summary.md` and its pictures, from the files of a run: clusters, losses, retrieval and hard captions per model."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from clipmoe_vlm.intervals import paired_interval  # noqa: E402
from clipmoe_vlm.runs import atomic_write, read_jsonl  # noqa: E402

ORDER = ("base", "expert", "random_routers", "uniform_average", "final")


def write(folder: Path) -> None:
    """Writes `summary.md`, `clusters.png`, `loss.png` and `scores.png` into the run's folder."""
    results = {file.stem: json.loads(file.read_text(encoding="utf-8"))
               for file in (folder / "evaluation").glob("[!.]*.json")}
    names = sorted(results, key=lambda name: (ORDER.index(name.split("_")[0] if name.startswith("expert") else name),
                                              name))
    results = {name: results[name] for name in names}
    clusters = {file.parent.name: json.loads(file.read_text()) for file in sorted(folder.glob("stage_*/clusters.json"))}
    metrics = read_jsonl(folder / "metrics.jsonl")
    trainings = len({row["stage"] for row in metrics})
    lines = ["# train_encoder", "", "The model is in `model/`; `config.yaml` says how it was made. "
             f"{len(metrics)} updates in {trainings} trainings.", ""]
    if results:
        lines += ["## Held-out scores", "", *score_table(results), "", *comparison(results), "",
                  "![scores](scores.png)", ""]
        plot_scores(results, folder / "scores.png")
    if clusters:
        lines += ["## Clusters", "",
                  "| stage | clusters | largest | smaller than a batch | drawn in a pass | not drawn |",
                  "|---|---|---|---|---|---|"]
        for name, c in clusters.items():
            lines.append(f"| {name} | {c['num_clusters']} | {max(c['sizes'])} | {c['too_small']} | "
                         f"{c['used_samples']} | {c['dropped_samples']} |")
        lines += ["", "![clusters](clusters.png)", ""]
        plot_clusters(clusters, folder / "clusters.png")
    lines += ["## Loss", "", "![loss](loss.png)", ""]
    plot_loss(metrics, folder / "loss.png")
    with atomic_write(folder / "summary.md") as stream:
        stream.write("\n".join(lines))


def score_table(results: dict[str, dict]) -> list[str]:
    """One row per model: R@1 both ways, hard-caption accuracy per kind with its 95% interval."""
    kinds = sorted({kind for result in results.values() for kind in result["hard"]})
    with_retrieval = any(result["retrieval"] for result in results.values())
    head = ["model", *(["image to text R@1", "text to image R@1"] if with_retrieval else []), *kinds]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, result in results.items():
        row = [name]
        if with_retrieval:
            row += [f"{100 * result['retrieval'][way]['R@1']:.1f}" for way in ("image_to_text", "text_to_image")]
        for kind in kinds:
            value = result["hard"][kind]
            between = "" if value["low"] is None else f" ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
            row.append(f"{100 * value['accuracy']:.1f}{between}")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def comparison(results: dict[str, dict]) -> list[str]:
    """What the final model gained and lost against its base, paired by sample, in words."""
    if not {"base", "final"} <= results.keys():
        return []
    base, final = results["base"], results["final"]
    differences = []
    if base["retrieval"]:
        for key, way in (("image_to_text_hits", "image to text R@1"), ("text_to_image_hits", "text to image R@1")):
            differences.append((way, paired_interval(final["retrieval"][key], base["retrieval"][key])))
    for kind in base["hard"]:
        rows = [(ours, theirs) for ours, theirs in zip(final["hard_items"], base["hard_items"], strict=True)
                if ours["kind"] == kind]
        differences.append((kind, paired_interval([a["correct"] for a, _ in rows], [b["correct"] for _, b in rows],
                                                  [a["image"] for a, _ in rows])))
    lines = []
    for what, interval in differences:
        verdict = "no clear difference"
        if interval.low > 0:
            verdict = "better than its base"
        elif interval.high < 0:
            verdict = "**worse than its base**"
        lines.append(f"- {what}: {100 * interval.mean:+.1f} points ({100 * interval.low:+.1f} to "
                     f"{100 * interval.high:+.1f}): {verdict}")
    lost = [what for what, interval in differences if interval.mean < 0]
    if lost:
        lines += ["", f"The result scores lower than its base on: {', '.join(lost)}."]
    return lines


def plot_scores(results: dict[str, dict], file: Path) -> None:
    kinds = sorted({kind for result in results.values() for kind in result["hard"]})
    groups = ([("image to text R@1", "image_to_text"), ("text to image R@1", "text_to_image")]
              if any(result["retrieval"] for result in results.values()) else [])
    figure, axes = plt.subplots(figsize=(1.8 * (len(groups) + len(kinds)) + 2, 4), layout="constrained")
    width = 0.8 / len(results)
    for number, (name, result) in enumerate(results.items()):
        heights = [100 * result["retrieval"][way]["R@1"] for _, way in groups]
        heights += [100 * result["hard"][kind]["accuracy"] for kind in kinds]
        errors = [[0.0] * len(groups), [0.0] * len(groups)]
        for kind in kinds:
            value = result["hard"][kind]
            for side, sign in ((0, "low"), (1, "high")):
                edge = value["accuracy"] if value[sign] is None else value[sign]
                errors[side].append(100 * abs(value["accuracy"] - edge))
        axes.bar([n + number * width for n in range(len(heights))], heights, width, yerr=errors, label=name, capsize=2)
    axes.set_xticks([n + 0.4 - width / 2 for n in range(len(groups) + len(kinds))], [g for g, _ in groups] + kinds)
    axes.set_ylabel("percent (bars: 95% intervals)")
    axes.legend(fontsize="small", ncols=2)
    save(figure, file)


def plot_clusters(clusters: dict[str, dict], file: Path) -> None:
    figure, axes = plt.subplots(1, len(clusters), figsize=(4 * len(clusters), 3), layout="constrained", squeeze=False)
    for plot, (name, counts) in zip(axes[0], clusters.items(), strict=True):
        plot.bar(range(len(counts["sizes"])), sorted(counts["sizes"], reverse=True), width=1.0)
        plot.set_title(f"{name}: {counts['num_clusters']} clusters", fontsize="medium")
        plot.set_xlabel("cluster, by size")
        plot.set_ylabel("samples")
    save(figure, file)


def plot_loss(metrics: list[dict], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        axes.plot([row["step"] for row in rows], [row["contrastive"] for row in rows], label=stage, linewidth=1)
    axes.set_xlabel("update")
    axes.set_ylabel("contrastive loss")
    axes.legend(fontsize="small")
    save(figure, file)


def save(figure, file: Path) -> None:
    with atomic_write(file, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
