"""`summary.md` with its pictures, from the files of a run: what was made, how long it took, scores, routing, and what
the numbers support."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from clipmoe_vlm import CLIPMoEConfig
from clipmoe_vlm.figures import plot_routing
from clipmoe_vlm.runs import atomic_write, duration, read_jsonl

from .compare import comparison, differences, headline, intervals, losses, print_red
from .config import EncoderConfig, MCLConfig, RouterConfig
from .evaluation_summary import cell, table
from .figures import Scores, plot_scores, plot_stage

if TYPE_CHECKING:
    from .train import Run

ORDER = ("base", "expert", "random_routers", "uniform_average", "final")
METHOD_WORDS = {
    "dmu": "DMU: {stages} of multistage contrastive learning within clusters, upcycling, router tuning",
    "direct": "direct fine-tuning of the feed-forward layers with the updates of all of DMU's stages",
    "sparse_upcycling": "sparse upcycling: copies of the base as experts, experts and routers trained with the updates "
                        "of all of DMU's stages",
    "mcl_random_batches": "as DMU with {stages}, but with random batches in the place of clusters",
    "without_mcl": "two experts: the base and one directly tuned; router tuning",
}


@dataclass(frozen=True)
class Training:
    """One training of a run: its folder, its name in `metrics.jsonl`, its settings, the evaluations around it."""

    folder: str
    metric: str
    settings: MCLConfig | RouterConfig
    before: str
    after: str


def trainings(config: EncoderConfig) -> list[Training]:
    if config.method in ("direct", "sparse_upcycling"):
        return [Training(config.method, config.method, config.mcl, "base", "final")]
    found = []
    for s in range(1, 2 if config.method == "without_mcl" else config.num_experts):
        before = f"expert_{s - 1}" if config.init_from == "previous" and s > 1 else "base"
        metric = "direct" if config.method == "without_mcl" else f"mcl_{s}"
        found.append(Training(f"stage_{s}", metric, config.mcl, before, f"expert_{s}"))
    return [*found, Training("router", "router", config.router, "random_routers", "final")]


def write(run: Run) -> None:
    """Writes `summary.md`, `scores.png`, `routing.png` and each training's `stage.png` into the run's folder."""
    folder, config = run.folder, run.config
    results = evaluations(folder)
    moe = CLIPMoEConfig.from_pretrained(folder / "model")
    lines = [f"# {Path(config.output_dir).resolve().name}", "",
             f"`model/` is {description(folder / 'model')}. `config.yaml` has every setting.", "",
             "## What was made from what", "", "| | |", "|---|---|",
             *(f"| {what} | {value} |" for what, value in recipe(run)), ""]
    if results:
        scores = scores_of_all(folder)
        plot_scores(folder / "scores.png", {name: headline(values) for name, values in scores.items()})
        lines += ["## Held-out scores", "", "The result against its base, paired by item:", "",
                  *comparison(results["base"], results["final"]), "",
                  "All models, in percent with 95% intervals clustered by picture:", "", *table(scores, {}, {}), "",
                  "![scores](scores.png)", ""]
        if sentence := losses(differences(results["base"], results["final"])):
            print_red(sentence)
    lines += ["## Trainings", "", *training_table(run), ""]
    for training in trainings(config):
        write_stage(run, training.folder)
        lines += [f"![{training.folder}]({training.folder}/stage.png)", ""]
    if (folder / "routing.jsonl").is_file():
        rows = read_jsonl(folder / "routing.jsonl")
        plot_routing(folder / "routing.png", rows, {"vision": moe.vision_config.first_moe_layer,
                                                    "text": moe.text_config.first_moe_layer})
        lines += ["## Routing", "", *routing_words(rows), "", "![routing](routing.png)", ""]
    lines += ["## What the numbers support", "", *support(results, config), ""]
    with atomic_write(folder / "summary.md") as stream:
        stream.write("\n".join(lines))


def write_stage(run: Run, name: str) -> None:
    """The main process writes `<name>/stage.png` of a finished training: clusters, loss, scores before and after."""
    folder = run.folder
    if not run.distributed.is_main:
        return
    training = next(t for t in trainings(run.config) if t.folder == name)
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == training.metric]
    clusters = folder / name / "clusters.json"
    scores = scores_of_all(folder)
    plot_stage(folder / name / "stage.png", f"{folder.resolve().name}: {name}", rows,
               json.loads(clusters.read_text()) if clusters.is_file() else None, training.settings.batch_size,
               {model: headline(scores[model]) for model in (training.before, training.after) if model in scores})


def evaluations(folder: Path) -> dict[str, dict]:
    """What was measured of each model, in the order of their making."""
    results = {file.stem: json.loads(file.read_text(encoding="utf-8"))
               for file in (folder / "evaluation").glob("[!.]*.json")}

    def place(name: str) -> tuple[int, int]:
        kind, _, number = name.partition("_") if name.startswith("expert") else (name, "", "0")
        return ORDER.index(kind), int(number)

    return {name: results[name] for name in sorted(results, key=place)}


# --- what was made -------------------------------------------------------------------------------------------------


def description(model: Path) -> str:
    """A phrase on a model folder: experts and parameters."""
    config = CLIPMoEConfig.from_pretrained(model)
    vision, text = config.vision_config, config.text_config
    total = active = 0
    with safe_open(model / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            count = math.prod(tensors.get_slice(name).get_shape())
            total += count
            tower = vision if name.startswith("vision_model.") else text
            active += count * tower.num_experts_per_tok // tower.num_experts if ".mlp.experts." in name else count
    if max(vision.num_experts, text.num_experts) == 1:
        return f"a dense CLIP of {millions(total)} parameters"
    return (f"a CLIP-MoE of {vision.num_experts} experts, of which each token uses {vision.num_experts_per_tok}: "
            f"{millions(total)} parameters, {millions(active)} active")


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def recipe(run: Run) -> list[tuple[str, str]]:
    """What the model was made of and how, as rows of a table; files by their names, without the maker's folders."""
    config, folder = run.config, run.folder
    base = CLIPMoEConfig.from_pretrained(folder / "base")
    rows = [("base", f"`{Path(config.model).name}`: pictures of {base.vision_config.image_size} px, texts of "
                     f"{base.text_config.max_position_embeddings} tokens"
                     + (" (stretched)" if config.text_length else "")),
            ("training data", f"`{Path(config.train_data).name}`: {len(run.samples):,} pairs of picture and caption"
                              + (f", short captions: {config.short_captions}" if config.short_captions else ""))]
    measured = evaluations(folder).get("base", {})
    if measured.get("retrieval"):
        n = measured["retrieval"]
        rows.append(("held-out captions", f"`{Path(config.validation_data).name}`: {n['n_images']:,} pictures, "
                     f"{n['n_captions']:,} captions"))
    if measured.get("hard_items"):
        rows.append(("hard captions", f"`{Path(config.hard_captions).name}`: {len(measured['hard_items']):,} questions "
                     "which caption of a picture is the true one"))
    stages = config.num_experts - 1
    rows.append(("method", METHOD_WORDS[config.method].format(stages=f"{stages} stage" + "s" * (stages > 1))))
    if config.method == "dmu":
        rows.append(("clusters", f"k-means, k = {config.num_clusters} per modality and stage; clusters smaller than a "
                     f"batch: {config.small_clusters}"))
    for training in trainings(config):
        s, done = training.settings, json.loads((folder / training.folder / "done.json").read_text())
        rows.append((training.folder, f"{done['steps']:,} updates of {s.batch_size} pairs, from `{training.before}`; "
                     f"learning rate {s.learning_rate:g}, {s.warmup_steps} warm-up updates, weight decay "
                     f"{s.weight_decay:g}, label smoothing {s.label_smoothing:g}{changed_settings(s)}"))
    scale = "the base's own" if config.logit_scale is None else f"{config.logit_scale:g}"
    rows.append(("logit scale, precision, seed", f"{scale}, {config.precision}, {config.seed}"))
    return rows


def changed_settings(settings: MCLConfig | RouterConfig) -> str:
    """The settings of a training that are not the paper's, besides those that always differ with the data."""
    said = ("batch_size", "learning_rate", "weight_decay", "warmup_steps", "epochs", "max_steps", "label_smoothing")
    return "".join(f", {field.name}: {getattr(settings, field.name)}" for field in dataclasses.fields(settings)
                   if field.name not in said and getattr(settings, field.name) != field.default)


def training_table(run: Run) -> list[str]:
    """One row per training: updates, time, loss, and what its clusters left unused."""
    metrics = read_jsonl(run.folder / "metrics.jsonl")
    head = ("training", "updates", "time of the updates", "loss, first and last tenth", "clusters",
            "smaller than a batch", "pairs not drawn in a pass")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for training in trainings(run.config):
        stage = run.folder / training.folder
        done = json.loads((stage / "done.json").read_text())
        rows = [row for row in metrics if row["stage"] == training.metric]
        loss, seconds = ([row[key] for row in rows] for key in ("contrastive", "seconds"))
        tenth = math.ceil(len(loss) / 10)
        cells = ["", "", ""]
        if (stage / "clusters.json").is_file():
            c = json.loads((stage / "clusters.json").read_text())
            share = c["dropped_samples"] / (c["used_samples"] + c["dropped_samples"])
            cells = [str(c["num_clusters"]), str(c["too_small"]), f"{c['dropped_samples']} ({share:.1%})"]
        lines.append(f"| {training.folder} | {done['steps']} | {duration(sum(seconds))} | "
                     f"{np.mean(loss[:tenth]):.3f}, {np.mean(loss[-tenth:]):.3f} | {' | '.join(cells)} |")
    return lines


def routing_words(rows: list[dict]) -> list[str]:
    """The last record of the routing in sentences."""
    last = rows[-1]
    lines = []
    for tower in ("vision", "text"):
        if f"{tower}_load" not in last:
            continue
        load, entropy, moved = (np.array(last[f"{tower}_{what}"]) for what in ("load", "entropy", "moved"))
        least, most = load.min(), load.max()
        lines.append(
            f"- {tower} tower, after update {last['step']}: routers are {100 * moved.min():.2g}% to "
            f"{100 * moved.max():.2g}% of their initial norm away from their start; entropy {entropy.min():.2f} to "
            f"{entropy.max():.2f} nats ({math.log(load.shape[1]):.2f}: undecided); an expert takes {least:.1%} to "
            f"{most:.1%} of a layer's tokens' choices ({1 / load.shape[1]:.1%}: balanced).")
    return lines


# --- scores --------------------------------------------------------------------------------------------------------


def scores_of_all(folder: Path) -> dict[str, Scores]:
    """The scores of every evaluated model of a run."""
    return {name: intervals(result) for name, result in evaluations(folder).items()}


def support(results: dict[str, dict], config: EncoderConfig) -> list[str]:
    """What the numbers say about the method's parts, from the controls, and what they cannot say."""
    lines = []
    if results:
        controls = [("random_routers", "Router tuning", "the same experts with untuned routers"),
                    ("uniform_average", "Routing", "all experts on every token with equal weights, for "
                     "more compute")]
        experts = [name for name in results if name.startswith("expert")]
        if experts:
            best = max(experts, key=lambda name: np.mean([i.mean for i in headline(intervals(results[name])).values()]))
            controls.append((best, "The mixture", f"its best single expert (`{best}`, by the mean of all measures)"))
        for name, part, words in controls:
            if name in results:
                lines.append(f"- {part}: the final model against {words}: "
                             f"{verdicts(headline(differences(results[name], results['final'])))}")
        measures = len(headline(intervals(results["final"])))
        lines.append(f"- The intervals hold for other pictures of the same kind. Each comparison stands alone: of "
                     f"{measures} measures without any true difference, about {0.05 * measures:.1f} would show a clear "
                     f"one.")
    lines.append(f"- This is one run with one seed ({config.seed}): how much another seed would change is not known.")
    if config.method not in ("direct", "sparse_upcycling"):
        lines.append("- Whether simpler tuning with as many updates does as well is not shown here: run "
                     "`method=direct` and `method=sparse_upcycling` into folders of their own.")
    if not results:
        lines.append("- Nothing was measured on held-out data: give validation_data or hard_captions.")
    return lines


def verdicts(found: Scores) -> str:
    """On which measures the difference is clear, in one sentence."""
    better = [f"{what} ({cell(i, '+')})" for what, i in found.items() if i.low > 0]
    worse = [f"{what} ({cell(i, '+')})" for what, i in found.items() if i.high < 0]
    parts = [f"better on {', '.join(better)}"] * bool(better) + [f"**worse on {', '.join(worse)}**"] * bool(worse)
    if not parts:
        return "no clear difference on any measure."
    rest = len(found) - len(better) - len(worse)
    return "; ".join(parts) + (f"; no clear difference on the other {rest}." if rest else ".")
