"""Dense CLIP -> CLIP-MoE: `python -m train_encoder.run CONFIG.yaml [key=value ...]`, or the same under torchrun.

Read `main` top to bottom. Each part leaves its result in the output folder under its final name only when it is
whole, so that typing the command again goes on where the last run ended.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
from transformers.utils import logging

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.convert import load_dense, processors_of, save_folder
from clipmoe_vlm.runs import (
    UserError,
    atomic_write,
    init_distributed,
    prepare_output,
    run_program,
    stage_seed,
    write_json,
)
from clipmoe_vlm.sigterm import end_on_sigterm, sigterm_waits
from clipmoe_vlm.upcycling import (
    expert_parameters,
    ffn_parameters,
    router_parameters,
    stretch_text_positions,
    uniform_average,
    upcycle,
)
from train_encoder import card, report, trackers
from train_encoder.clusters import accumulate, centres, stage_labels
from train_encoder.config import MAY_CHANGE, EncoderConfig, check
from train_encoder.data import Samples, load_collate
from train_encoder.features import Features, Items, encode
from train_encoder.routers import start_from_centroids
from train_encoder.sampler import batch_report, merge_small
from train_encoder.sources import build_index
from train_encoder.tasks import load_held_out
from train_encoder.train import Run, steps_per_pass, train
from train_encoder.zero_shot import HeldOut, evaluate

MUCH_LOST = 0.1  # share of the samples; a stage that does not draw as many is told how to lose fewer
TOLD = 100  # unreadable samples that are named; a wrong image_root would name them all


def main(config: EncoderConfig) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers run inside forked workers
    logging.disable_progress_bar()
    distributed = init_distributed()
    folder = Path(config.output_dir)

    def prepare() -> HeldOut:
        check(config, distributed)
        prepare_output(config, may_change=MAY_CHANGE)
        if "wandb" in config.trackers:
            trackers.open_wandb(config, folder)
        found = build_index(config.train_data, folder / "index" / "train.jsonl", config.image_column,
                            config.caption_column, config.image_root, config.short_captions)
        print(f"train data: {found}", flush=True)
        held_out = load_held_out(config, folder / "index" / "validation.jsonl")
        make_base(config, folder)
        return held_out

    held_out = distributed.main_first(prepare)
    if not (folder / "base").is_dir():
        raise UserError(f"output_dir {folder.resolve()}: process {distributed.rank} cannot see what the main process "
                        "wrote there; it must lie on a file system that all nodes share")
    base = CLIPMoEModel.from_pretrained(folder / "base")
    collate = load_collate(folder / "base")
    run = Run(config, distributed, folder, Samples(folder / "index" / "train.jsonl"), collate)

    def measure(name: str, model: CLIPMoEModel, where: str) -> None:
        evaluate(name, model, where, held_out, collate, folder, config, distributed)

    measure("base", base, "base")
    everything = np.zeros(len(run.samples), np.int64)  # one cluster of all samples: random batches
    stages = config.num_experts - 1
    mcl_steps = steps_of(config.mcl, everything)
    budget = stages * mcl_steps + steps_of(config.router, everything)

    if config.method == "direct":
        tune_dense(run, "direct", "base", everything, dataclasses.replace(config.mcl, max_steps=budget))
        finish(run, CLIPMoEModel.from_pretrained(folder / "direct" / "model"))
    elif config.method == "sparse_upcycling":
        train_moe(run, "sparse_upcycling", mixture(config, [base] * config.num_experts),
                  dataclasses.replace(config.mcl, max_steps=budget), experts_too=True)
    else:
        if config.method == "without_mcl":
            names = ["stage_1"]
            tune_dense(run, "stage_1", "base", everything,
                       dataclasses.replace(config.mcl, max_steps=stages * mcl_steps))
            measure("expert_1", *load(folder, "stage_1/model"))
            report.write_stage(run, "stage_1")
        else:
            names = [f"stage_{s}" for s in range(1, stages + 1)]
            mcl_stages(run, names, everything, measure)
        untuned = mixture(config, [base, *(load(folder, f"{name}/model")[0] for name in names)])
        measure("random_routers", untuned, "model before router tuning")
        train_moe(run, "router", untuned, config.router, experts_too=False)
        measure("uniform_average", uniform_average(load(folder, "model")[0]), "model, all experts weighted equally")
    measure("final", *load(folder, "model"))
    distributed.barrier()
    if distributed.is_main:
        report.write(run)
        card.write(run)
        trackers.finish(run, report.scores_of_all(folder))
        print(f"done: the model is in {folder / 'model'}, the summary in {folder / 'summary.md'}", flush=True)


def make_base(config: EncoderConfig, folder: Path) -> None:
    """Writes `base/`: the dense CLIP in our format, its text positions stretched if wanted."""
    if (folder / "base").is_dir():
        return
    try:
        model = load_dense(config.model, config.architecture)
        if config.text_length is not None and config.text_length != model.config.text_config.max_position_embeddings:
            model = stretch_text_positions(model, config.text_length)
        image_processor, tokenizer = processors_of(config.model, config.architecture, model.config)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"model: {error}") from error
    layers = model.config.vision_config.num_hidden_layers
    if config.first_moe_layer >= layers:
        raise UserError(f"first_moe_layer: {config.first_moe_layer} leaves no MoE layer: the vision tower of "
                        f"{config.model} has the blocks 0..{layers - 1}")
    if tokenizer is None:
        raise UserError(f"model {config.model}: it has no tokenizer files, and its vocabulary is not CLIP's; put a "
                        "tokenizer_config.json with its files into its folder")
    save_folder(model, folder / "base", image_processor, tokenizer)


def steps_of(settings, labels: np.ndarray) -> int:
    """Updates of a training on random batches. (In an MCL stage of as many epochs the clusters' remainders make it
    fewer: the baselines' budget is then the larger one. With max_steps they are equal.)

    Raises:
        UserError: fewer samples than one batch.
    """
    if len(labels) < settings.batch_size:
        raise UserError(f"train_data has {len(labels)} samples, fewer than one batch of {settings.batch_size}; lower "
                        "mcl.batch_size and router.batch_size, or add data")
    return settings.max_steps or settings.epochs * steps_per_pass(labels, settings.batch_size)


def load(folder: Path, name: str) -> tuple[CLIPMoEModel, str]:
    """A model of this run, and its place."""
    return CLIPMoEModel.from_pretrained(folder / name), name


def mixture(config: EncoderConfig, models: list[CLIPMoEModel]) -> CLIPMoEModel:
    """The CLIP-MoE of these experts with fresh routers."""
    return upcycle(models, num_experts_per_tok=min(config.top_k, len(models)),
                   vision_first_moe_layer=config.first_moe_layer, expert_dropout=config.router.expert_dropout,
                   balance_bias=config.router.balancing == "bias", base_gate=config.router.base_gate, seed=config.seed)


def mcl_stages(run: Run, names: list[str], everything: np.ndarray, measure) -> None:
    """Multistage contrastive learning: each stage clusters what the model before it sees and trains within clusters."""
    config, folder = run.config, run.folder
    before = "base"
    if run.distributed.is_main and config.method == "dmu" and config.num_clusters != "auto":
        count = config.num_clusters ** (2 * len(names))
        if len(run.samples) < count * config.mcl.batch_size:
            print(f"note: the {count} clusters of {names[-1]} can hold {len(run.samples) / count:.0f} samples each on "
                  f"average, fewer than a batch of {config.mcl.batch_size}: many may be lost to a pass", flush=True)
    for number, name in enumerate(names):
        if not (folder / name / "done.json").is_file():
            labels = everything
            if config.method == "dmu":
                labels = cluster_stage(run, [folder / earlier for earlier in names[:number + 1]], before)
            tune_dense(run, name, before if config.init_from == "previous" else "base", labels, config.mcl)
        before = f"{name}/model"
        measure(f"expert_{name.removeprefix('stage_')}", *load(folder, before))
        report.write_stage(run, name)


def cluster_stage(run: Run, stages: list[Path], before: str) -> np.ndarray:
    """Encodes the training set with the model `before`, clusters it, and returns the labels to draw batches from.

    Args:
        stages: the folders of the stages so far; the last one is to be clustered, the features of the others are there.
    """
    config, distributed, stage = run.config, run.distributed, stages[-1]
    if distributed.main_first((stage / "clusters.json").is_file):
        return np.load(stage / "batch_labels.npy")
    model = load(run.folder, before)[0].to(distributed.device).eval()
    errors: list[str] = []
    for key, feature, get, collate in (
            ("image", model.get_image_features, run.samples.picture, run.collate.pictures),
            ("text", model.get_text_features, run.samples.caption, run.collate.captions)):
        errors += encode(feature, Items(len(run.samples), get), collate, stage / "features" / key,
                         dim=model.config.projection_dim, distributed=distributed, workers=config.workers,
                         precision=config.precision, dtype=np.float16, description=f"{stage.name}: encoding {key}s")
    del model, feature  # both hold the model, and clustering needs its memory

    def cluster() -> None:
        for sentence in errors[:TOLD]:
            print(f"{stage.name}: skipped {sentence}", flush=True)
        if len(errors) > TOLD:
            print(f"{stage.name}: skipped {len(errors) - TOLD} more ({stage / 'features'}/*/*.json)", flush=True)
        seen = stages if config.stage_features == "all" else [stage]
        image, text = (Features([folder / "features" / key for folder in seen]) for key in ("image", "text"))
        labels, chosen = stage_labels(image, text, config.num_clusters,
                                      seed=stage_seed(config.seed, stage.name, "clusters"))
        count = chosen["text_clusters"] * chosen["image_clusters"]
        accumulated = accumulate(None if len(stages) == 1 else np.load(stages[-2] / "labels.npy"), labels, count)
        drawn = accumulated
        if config.small_clusters == "merge":
            values = np.unique(accumulated[accumulated >= 0])
            drawn = merge_small(accumulated, centres(image, text, accumulated), values // count, config.mcl.batch_size)
        counts = chosen | batch_report(drawn, config.mcl.batch_size)
        counts["unreadable_samples"] = int((labels < 0).sum())
        for file, array in (("labels.npy", accumulated), ("batch_labels.npy", drawn)):
            with atomic_write(stage / file, "wb") as stream:
                np.save(stream, array)
        write_json(stage / "clusters.json", counts)
        lost = counts["dropped_samples"] / (counts["used_samples"] + counts["dropped_samples"])
        print(f"{stage.name}: {counts['num_clusters']} clusters, {counts['too_small']} smaller than a batch; "
              f"{counts['dropped_samples']} samples ({lost:.1%}) not drawn in a pass; "
              f"{counts['unreadable_samples']} unreadable", flush=True)
        if lost > MUCH_LOST:
            merge = "small_clusters: merge, " if config.small_clusters == "drop" else ""
            print(f"{stage.name}: note: {lost:.0%} of the samples are lost to a pass, since what remains of a cluster "
                  f"does not fill a batch of {config.mcl.batch_size}; {merge}fewer clusters (num_clusters) or a "
                  "smaller mcl.batch_size would lose fewer", flush=True)

    distributed.main_first(cluster)
    return np.load(stage / "batch_labels.npy")


def tune_dense(run: Run, name: str, start: str, labels: np.ndarray, settings) -> None:
    """Fine-tunes the feed-forward layers of the run's dense CLIP `start` and saves it as `<name>/model`, once."""
    stage = run.folder / name
    if (stage / "done.json").is_file():
        return
    started = time.time()
    model = load(run.folder, start)[0]
    trainable = dict(ffn_parameters(model, run.config.first_moe_layer))
    with sigterm_waits():
        steps = train(metric_name(run, name), model, trainable, labels, settings, run, stage)
        save_done(run, model, stage / "model", stage, steps, started)


def metric_name(run: Run, folder_name: str) -> str:
    """What `metrics.jsonl` calls the training that fills this folder."""
    return "direct" if run.config.method in ("direct", "without_mcl") else folder_name.replace("stage_", "mcl_")


def train_moe(run: Run, name: str, model: CLIPMoEModel, settings, *, experts_too: bool) -> None:
    """Trains the routers (and the experts, for sparse upcycling) and saves the result as `model`, once."""
    stage = run.folder / name
    if (stage / "done.json").is_file():
        return
    started, router = time.time(), run.config.router
    if router.init == "centroids":
        start_from_centroids(model, run)
    for tower in (model.config.vision_config, model.config.text_config):
        tower.router_z_loss_coef = router.z_loss_coef
    trainable = dict(router_parameters(model)) | (dict(expert_parameters(model)) if experts_too else {})
    everything = np.zeros(len(run.samples), np.int64)
    with sigterm_waits():
        steps = train(name, model, trainable, everything, settings, run, stage)
        save_done(run, model, run.folder / "model", stage, steps, started)


def finish(run: Run, model: CLIPMoEModel) -> None:
    """Makes `model/` of a dense result."""
    if run.distributed.is_main and not (run.folder / "model").is_dir():
        save_folder(model, run.folder / "model", run.collate.image_processor, run.collate.tokenizer)
    run.distributed.barrier()


def save_done(run: Run, model: CLIPMoEModel, target: Path, stage: Path, steps: int, started: float) -> None:
    """Saves a trained model, then says in `done.json` that it is there, then drops the checkpoint."""
    if run.distributed.is_main:
        save_folder(model.eval(), target, run.collate.image_processor, run.collate.tokenizer)
        write_json(stage / "done.json", {"steps": steps, "seconds": round(time.time() - started, 1)})
        (stage / "checkpoint.safetensors").unlink(missing_ok=True)
    run.distributed.barrier()


if __name__ == "__main__":
    end_on_sigterm()
    run_program(main, EncoderConfig, "python -m train_encoder.run")
