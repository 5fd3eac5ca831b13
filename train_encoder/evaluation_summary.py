"""`scores.json`, `summary.md` and `scores.png` of an evaluation: each task's models side by side and against their
bases."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from clipmoe_vlm.intervals import Interval  # noqa: E402
from clipmoe_vlm.runs import atomic_write, write_json  # noqa: E402

from .compare import caution, differences, intervals, is_lower, losses  # noqa: E402

Results = dict[str, dict[str, dict]]  # by task, then by model


def write_summary(folder: Path, results: Results, bases: dict[str, str]) -> None:
    """`bases` gives the base of each model that has one."""
    scores = {task: {name: intervals(result) for name, result in models.items()} for task, models in results.items()}
    changes = changes_of(results, bases)
    write_json(folder / "scores.json", {task: {
        "models": {name: {measure: as_json(value) for measure, value in one.items()} for name, one in models.items()},
        "differences": {name: {"base": bases[name], **{measure: as_json(value) for measure, value in one.items()}}
                        for name, one in changes[task].items()},
    } for task, models in scores.items()})
    lines = ["# Zero-shot evaluation", ""]
    for sentence in losses_to_bases(results, bases):
        lines += caution(sentence)
    lines += ["Percent, with 95% intervals clustered by picture; differences are paired. 🔴: lower than the base, "
              "bold if clearly so.", "", "![scores](scores.png)", ""]
    for task, models in scores.items():
        lines += [f"## {task}", "", *notes(results[task]), "", *table(models, changes[task], bases), ""]
    if not bases:
        lines += ["There was no base to compare with: name one by the key `base`.", ""]
    plot(scores, changes, folder / "scores.png")
    with atomic_write(folder / "summary.md") as stream:
        stream.write("\n".join(lines))


def changes_of(results: Results, bases: dict[str, str]) -> dict[str, dict[str, dict[str, Interval]]]:
    """By task and model the differences to the model's base."""
    return {task: {name: differences(models[base], models[name]) for name, base in bases.items()}
            for task, models in results.items()}


def losses_to_bases(results: Results, bases: dict[str, str]) -> list[str]:
    """For each model that is below its base on some task, the sentence that says so."""
    changes = changes_of(results, bases)
    sentences = [losses({f"{task} {measure}": change for task, models in changes.items()
                         for measure, change in models[name].items()}, name, f"its base ({base})")
                 for name, base in bases.items()]
    return [sentence for sentence in sentences if sentence]


def as_json(interval: Interval) -> dict:
    """An interval without what JSON has no word for."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in interval.__dict__.items() if key != "p_value" or value is not None}


def notes(models: dict[str, dict]) -> list[str]:
    """How much was measured, and what went wrong with it."""
    result = next(iter(models.values()))
    if found := result.get("retrieval"):
        what = f"Retrieval: {found['n_images']} pictures, {found['n_captions']} captions."
    elif found := result.get("classification"):
        what = f"Classification: {found['n_images']} pictures, {found['n_classes']} classes."
    else:
        what = f"Hard captions: {len(result['hard_items'])} rows, {len(result['hard'])} kinds."
    if result["skipped_pictures"]:
        what += f" {result['skipped_pictures']} pictures could not be read and are left out."
    cut = [f"{one['truncated_texts']} by {name} (to {one['text_length']} tokens)" for name, one in models.items()
           if one["truncated_texts"]]
    return [what + (f" Texts cut: {', '.join(cut)}." if cut else "")]


def table(models: dict[str, dict[str, Interval]], changes: dict[str, dict[str, Interval]],
          bases: dict[str, str]) -> list[str]:
    measures = list(next(iter(models.values())))
    lines = ["| | " + " | ".join(measures) + " |", "|" + "---|" * (len(measures) + 1)]
    for name, scores in models.items():
        lines.append(f"| {name} | " + " | ".join(cell(scores[measure]) for measure in measures) + " |")
    for name, one in changes.items():
        cells = []
        for measure in measures:
            text = cell(one[measure], "+")
            lost, clear = is_lower(one[measure]), one[measure].high < 0
            cells.append(f"🔴 **{text}**" if clear else f"🔴 {text}" if lost else text)
        lines.append(f"| {name} - {bases[name]} | " + " | ".join(cells) + " |")
    return lines


def cell(interval: Interval, sign: str = "") -> str:
    text = f"{100 * interval.mean:{sign}.1f}"
    return text if math.isnan(interval.low) else (
        f"{text} ({100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f})")


def plot(scores: dict[str, dict[str, dict[str, Interval]]], changes: dict[str, dict[str, dict[str, Interval]]],
         file: Path) -> None:
    """A panel per task with a bar per model and measure; a bar below its base's has a red edge."""
    figure, axes = plt.subplots(len(scores), figsize=(9, 3 * len(scores) + 1), layout="constrained", squeeze=False)
    for panel, (task, models) in zip(axes[:, 0], scores.items(), strict=True):
        measures, width = list(next(iter(models.values()))), 0.8 / len(models)
        for number, (name, one) in enumerate(models.items()):
            values = [one[measure] for measure in measures]
            places = [place + number * width for place in range(len(measures))]
            lost = [name in changes[task] and is_lower(changes[task][name][measure]) for measure in measures]
            panel.bar(places, [100 * value.mean for value in values], width, label=name, color=f"C{number % 10}",
                      edgecolor=["red" if below else "none" for below in lost], linewidth=2,
                      yerr=[0 if math.isnan(value.low) else 100 * (value.high - value.mean) for value in values],
                      capsize=2)
        panel.set_xticks([place + 0.4 - width / 2 for place in range(len(measures))], measures, fontsize="small")
        panel.set_ylabel("percent")
        panel.set_title(task + (" (red: below its base)" if any(changes[task]) else ""), fontsize="medium")
    axes[0, 0].legend(fontsize="small", ncols=min(4, len(next(iter(scores.values())))))
    with atomic_write(file, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
