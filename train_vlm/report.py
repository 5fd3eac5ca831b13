"""`summary.md` and its picture, from the files of a run: what was trained from what, how it went, and what the numbers
support."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

import torch

from clipmoe_vlm.figures import plot_routing
from clipmoe_vlm.runs import atomic_write, duration, read_jsonl
from train_vlm.figures import plot_curves

if TYPE_CHECKING:
    from train_vlm.train import Run

NAMED = 5  # samples named of each kind of problem
COLUMNS = 4  # steps shown side by side


def write_summary(run: Run) -> Path:
    """Writes `summary.md` and `curves.png` of a finished run; returns the former."""
    output, name = run.output, run.output.resolve().name
    rows = read_jsonl(output / "metrics.jsonl")
    updates = [row for row in rows if "loss" in row]
    measurements = [row for row in rows if "loss" not in row]
    plot_curves(output / "curves.png", name, updates, measurements)
    lines = [f"# {name}", "",
             f"`model/` loads with `{type(run.model).__name__}`; `config.yaml` has every setting.", "",
             "## What was trained from what", "", "| | |", "|---|---|",
             *(f"| {what} | {value} |" for what, value in recipe(run, updates)), "", "```", run.parts, "```", "",
             "## How it went", "", "| | |", "|---|---|",
             *(f"| {what} | {value} |" for what, value in course(updates, measurements)), "",
             "![curves](curves.png)", "", *problems(output, updates)]
    if (output / "routing.jsonl").is_file() and (rows := read_jsonl(output / "routing.jsonl")):
        plot_routing(output / "routing.png", rows, {"vision": run.model.config.vision_config.first_moe_layer})
        lines += ["## Experts of the tower", "", "![routing](routing.png)", ""]
    if any("evaluation" in row for row in measurements):
        lines += ["## Scores", "", *scores_table(measurements), ""]
    if (output / "answers.jsonl").is_file():
        lines += ["## Answers", "", *answers_table(read_jsonl(output / "answers.jsonl")), ""]
    lines += ["## What the numbers support", "", *support(run, updates, measurements), ""]
    with atomic_write(output / "summary.md") as stream:
        stream.write("\n".join(lines))
    return output / "summary.md"


def recipe(run: Run, updates: list[dict]) -> list[tuple[str, str]]:
    config = run.config
    sources = {"VLM": config.vlm, "language model": config.llm, "vision tower": config.vision_tower}
    rows = [(what, f"`{short(source)}`") for what, source in sources.items() if source]
    data = run.dataset.samples.sources
    epoch = sum(round(len(one) * one.weight) for one in data)
    passes = sum(row["samples"] + row["skipped"] for row in updates) / epoch
    clipping = f"gradients clipped at {config.max_grad_norm:g}" if config.max_grad_norm else "no clipping of gradients"
    rows += [("data", "; ".join(f"`{Path(one.path).name}`: {len(one):,} samples"
                                + f", weight {one.weight:g}" * (one.weight != 1) for one in data)
              + f"; {passes:.3g} passes"),
             ("held-out data", f"`{Path(config.validation_data).name}`" if config.validation_data else "none"),
             ("prompt", f"template `{config.template}`, at most {config.max_length:,} tokens, pictures: "
                        f"{config.image_aspect_ratio}"),
             ("updates", f"{len(updates):,} of {config.global_batch_size} samples; warm-up {config.warmup_ratio:.0%}, "
                         f"{clipping}"),
             ("engine", f"{run.processes.world_size} process{'es' * (run.processes.world_size > 1)} on {device()}, "
                        f"ZeRO {config.zero_stage}, {config.precision}, seed {config.seed}")]
    return rows


def short(source: str) -> str:
    """The last part of a path or a hub's name; of `stage_1/model` that much, as every finished folder is a `model`."""
    folder = Path(source)
    return f"{folder.resolve().parent.name}/model" if folder.name == "model" else folder.name


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPUs"


def course(updates: list[dict], measurements: list[dict]) -> list[tuple[str, str]]:
    tenth = math.ceil(len(updates) / 10)
    loss = [row["lm_loss"] for row in updates]
    seconds = sum(row["seconds"] for row in updates)
    rows = [("language-model loss, mean of the first and last tenth of the updates",
             f"{mean(loss[:tenth]):.4f}, {mean(loss[-tenth:]):.4f}")]
    held_out = [row for row in measurements if "validation_loss" in row]
    if held_out:
        first, best, last = held_out[0], min(held_out, key=lambda row: row["validation_loss"]), held_out[-1]
        rows.append((f"loss on {last['validation_samples']:,} held-out samples",
                     f"{first['validation_loss']:.4f} after {first['step']} updates, {last['validation_loss']:.4f} "
                     f"after {last['step']}; lowest {best['validation_loss']:.4f} after {best['step']}"))
    rows += [("time of the updates", f"{duration(seconds)}, {median(row['seconds'] for row in updates):.3g} s each "
              f"(median), {sum(row['data_seconds'] for row in updates) / seconds:.0%} of it waiting for data"),
             ("tokens per second, median", f"{median(row['tokens_per_second'] for row in updates):,.0f}"),
             ("utilisation, median", f"{median(row['utilisation'] for row in updates):.1%} of what the hardware can "
              "compute"),
             ("peak memory of the main process", f"{max(row['peak_memory_gib'] for row in updates):.2f} GiB "
              f"{'of the GPU' if torch.cuda.is_available() else '(resident)'}"),
             ("label tokens", f"{sum(row['label_tokens'] for row in updates):,} of "
              f"{sum(row['tokens'] for row in updates):,} tokens"),
             ("samples used, skipped, truncated",
              ", ".join(f"{sum(row[key] for row in updates):,}" for key in ("samples", "skipped", "truncated")))]
    return rows


def problems(output: Path, updates: list[dict]) -> list[str]:
    """The first few skipped and truncated samples by name."""
    rows = read_jsonl(output / "problems.jsonl")
    lines = []
    for kind in ("skipped", "truncated"):
        names = [name for row in rows for name in row[kind]]
        if names:
            more = sum(row[kind] for row in updates) - len(names[:NAMED])
            lines.append(f"- {kind}: {'; '.join(names[:NAMED])}"
                         + f" and {more:,} more (`problems.jsonl`)" * (more > 0))
    return [*lines, ""] if lines else []


def spread(steps: list[int]) -> list[int]:
    """The first, the last, and some steps between."""
    if len(steps) <= COLUMNS:
        return steps
    return [steps[round(n * (len(steps) - 1) / (COLUMNS - 1))] for n in range(COLUMNS)]


def scores_table(measurements: list[dict]) -> list[str]:
    scores = {row["step"]: row["evaluation"] for row in measurements if "evaluation" in row}
    steps = spread(list(scores))
    lines = [f"| after update | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for name in scores[steps[-1]]:
        cells = [f"{scores[step][name]:.1f}" if name in scores[step] else "" for step in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"Each with its 95% interval and all other figures: `evaluations/step_{steps[-1]}/summary.md`."]


def answers_table(rows: list[dict]) -> list[str]:
    steps = spread(list(dict.fromkeys(row["step"] for row in rows)))
    lines = [f"| picture | question | expected | {' | '.join(f'after {step}' for step in steps)} |",
             "|---" * (len(steps) + 3) + "|"]
    for name in dict.fromkeys(row["id"] for row in rows):
        given = {row["step"]: row for row in rows if row["id"] == name}
        one = next(iter(given.values()))
        cells = [", ".join(Path(picture).name for picture in one["pictures"]), one["question"], one["expected"],
                 *(given[step]["answer"] if step in given else "" for step in steps)]
        lines.append(f"| {' | '.join(map(as_cell, cells))} |")
    return lines


def as_cell(text: str) -> str:
    """A text as one cell of a table, cut if it is long."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text[:100] + "…" if len(text) > 100 else text


def support(run: Run, updates: list[dict], measurements: list[dict]) -> list[str]:
    """What the numbers say, and what they cannot say."""
    lines = []
    held_out = [row for row in measurements if "validation_loss" in row]
    if held_out:
        best, last = min(held_out, key=lambda row: row["validation_loss"]), held_out[-1]
        if known := last["validation_also_trained_on"]:
            lines.append(f"- **{known:,} of the {last['validation_samples']:,} held-out samples are trained on, too**: "
                         "their loss says nothing about other samples.")
        elif best is not last:
            lines.append(f"- The held-out loss was lowest after update {best['step']} and is "
                         f"{last['validation_loss'] - best['validation_loss']:.4f} higher now: the model has begun to "
                         "learn its training samples by heart, or the difference is noise.")
        else:
            lines.append("- The held-out loss was lowest at the end: longer training might still help.")
    else:
        lines.append("- Nothing was measured on held-out samples: give validation_data. The loss above is that of "
                     "samples as they are trained on, each before its own update.")
    if any("evaluation" in row for row in measurements):
        lines.append("- Scores of different steps answer the same questions: `python -m eval_vlm.compare` gives their "
                     "paired difference with its interval.")
    else:
        lines.append("- A low loss does not show that the model answers well: give evaluation, or run "
                     "`python -m eval_vlm.run` on `model/`.")
    lines.append(f"- This is one run with one seed ({run.config.seed}): how much another seed would change is not "
                 "known.")
    return lines
