"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaNextConfig, LlavaNextProcessor, LlavaProcessor

from clipmoe_vlm.loading import loader
from clipmoe_vlm.runs import Distributed, UserError, prepare_output, set_seed, stage_seed
from clipmoe_vlm.sigterm import let_sigterm_wait, sigterm_asked
from clipmoe_vlm.trackers import start_wandb
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from train_vlm.config import MAY_CHANGE, VLMConfig, check
from train_vlm.data import ConversationDataset, make_dataset
from train_vlm.engine import gathered, start_engine, start_processes, stop, summed, to_device, told_once
from train_vlm.features import fill
from train_vlm.flops import StepFlops, peak_flops
from train_vlm.log import RunLog
from train_vlm.loss import VLMLoss
from train_vlm.measurements import Measurements
from train_vlm.model import VLM, build
from train_vlm.report import write_summary
from train_vlm.sampler import BatchPlan
from train_vlm.samples import read_samples
from train_vlm.saving import gather_weights, save_adapter, save_vlm
from train_vlm.tuning import ADAPTERS, describe, parameter_groups, set_trainable


@dataclass
class Run:
    """A run that is ready to train."""

    config: VLMConfig
    processes: Distributed
    output: Path
    dataset: ConversationDataset
    model: VLM
    processor: LlavaProcessor | LlavaNextProcessor
    groups: list[dict[str, Any]]  # of the optimizer, with their peak learning rates
    parts: str  # a table of them
    step_flops: StepFlops
    engine: Any
    loader: Iterator[dict[str, Any]]  # this process's micro-batches from `first_step` on
    accumulation_steps: int
    first_step: int
    total_steps: int


def train(config: VLMConfig) -> None:
    """Trains a VLM from start, or from its last checkpoint, to the finished folder `output_dir/model`."""
    processes = start_processes()
    with told_once(processes):
        check(config, processes.world_size)
    output = Path(processes.main_first(partial(prepare_output, config, MAY_CHANGE)))
    if (output / "model").is_dir():
        if processes.is_main:
            remove_checkpoints(output / "checkpoints")  # of a run that was killed just then
            print(f"{output / 'model'} is finished; remove {output} to train again")
        return
    if "wandb" in config.trackers:
        processes.main_first(partial(start_wandb, config, output, "train_vlm"))
    run = set_up(config, processes, output)
    engine = run.engine
    # Without ZeRO in float32 DeepSpeed clips but keeps the norm to itself.
    engine_clips = config.zero_stage > 0 or config.precision != "fp32"
    trained = [parameter for group in run.groups for parameter in group["params"]]
    peak_rates = {group["name"]: group["lr"] for group in run.groups}
    loss_weights = torch.tensor([1.0, config.router_aux_loss_coef, config.router_z_loss_coef], device=processes.device)
    log = RunLog(run) if processes.is_main else None
    peak = peak_flops(processes.device, config.precision) * processes.world_size if log else math.nan
    measurements = Measurements(run, log)

    for step in range(run.first_step, run.total_steps):
        measurements.take(step)
        started = time.perf_counter()
        batches = [next(run.loader) for _ in range(run.accumulation_steps)]
        waited = time.perf_counter() - started
        counts = totals(batches, processes)
        problems = [problem for batch in batches for problem in batch["problems"]]
        if counts["skipped"]:
            problems = gathered(problems, processes)
        if not counts["label_tokens"]:
            stop(processes, f"step {step + 1}: no sample of the batch can be used ({'; '.join(problems[:3])})")
        # Every step draws dropout from its own seed: a resumed run needs no generator state.
        torch.manual_seed(stage_seed("dropout", config.seed, step, processes.rank))
        for group in engine.optimizer.param_groups:
            group["lr"] = peak_rates[group["name"]] * schedule(step, run.total_steps, config.warmup_ratio)

        losses, routing = [], []
        for batch in batches:
            loss_sum, router_losses, micro_routing = engine(**to_device(batch["inputs"], processes.device))
            # Each label token of the global batch weighs the same wherever it is (LLaVA: each micro-batch): the engine
            # will divide by processes and micro-batches, so multiply by them first. What routers do is averaged by
            # what the tower sees.
            divisor = counts["label_tokens"]
            if config.loss_normalization == "llava":
                divisor = max(batch["counts"]["label_tokens"], 1) * processes.world_size * run.accumulation_steps
            share = batch["counts"]["tiles"] / max(counts["tiles"], 1)
            parts = torch.cat([(loss_sum / divisor).view(1), router_losses * share])
            losses.append(parts.detach())
            if micro_routing is not None:
                routing.append(micro_routing * share)
            engine.backward((parts * loss_weights).sum() * (processes.world_size * run.accumulation_steps))
            if batch is not batches[-1]:
                engine.step()

        asked = losses[0].new_tensor([sigterm_asked()])  # whichever process the signal reached
        lm_loss, aux_loss, z_loss, stopping = summed(torch.cat([torch.stack(losses).sum(0), asked]), processes)
        if not math.isfinite(lm_loss + aux_loss + z_loss):
            bad = [batch["ids"] for batch, part in zip(batches, losses, strict=True) if not part.isfinite().all()]
            stop(processes, f"step {step + 1}: the loss is not finite ({lm_loss}, aux {aux_loss}, z {z_loss}); nothing "
                            "was updated; samples: ", bad)
        if engine_clips:
            engine.step()
            grad_norm = float(engine.get_global_grad_norm() or 0.0)
        else:
            grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf))
            engine.step()
        if not math.isfinite(grad_norm):
            stop(processes, f"step {step + 1}: the gradient is not finite; the last checkpoint is good; samples: ",
                 [batch["ids"] for batch in batches])

        routing_is_due = (step + 1) % config.log_routing_every == 0 or step in (0, run.total_steps - 1)
        if routing and routing_is_due and counts["pictures"]:
            routing = global_routing(routing, processes)
        else:
            routing = None
        if log:
            seconds = time.perf_counter() - started
            loss = lm_loss + config.router_aux_loss_coef * aux_loss + config.router_z_loss_coef * z_loss
            log.update(step + 1, problems, [name for batch in batches for name in batch["truncated"]],
                       loss=loss, lm_loss=lm_loss, aux_loss=aux_loss, z_loss=z_loss, routing=routing,
                       lr={group["name"]: group["lr"] for group in engine.optimizer.param_groups}, grad_norm=grad_norm,
                       seconds=seconds, data_seconds=waited, utilisation=run.step_flops(counts) / (seconds * peak),
                       **counts)
        due = (step + 1) % config.checkpoint_every == 0 and step + 1 < run.total_steps
        if stopping or due or measurements.evaluates_at(step + 1):
            save_checkpoint(engine, output / "checkpoints", step + 1, processes)
            if log and not stopping:
                log.say(f"after step {step + 1}: checkpoint written")
        if stopping:
            if log:
                log.close()
                print(f"stopped by SIGTERM after update {step + 1} of {run.total_steps}; the same command goes on from "
                      "there", flush=True)
            raise SystemExit(0)

    measurements.take(run.total_steps)
    finish(run, log)


def set_up(config: VLMConfig, processes: Distributed, output: Path) -> Run:
    """Reads the data, builds the model and its engine, and restores the last checkpoint.

    Raises:
        UserError: the data, the model or the checkpoint can't be used.
    """
    samples = processes.main_first(partial(read_samples, config.data, config.image_folder, output / "data"))
    with told_once(processes):
        set_seed(config.seed)
        model, processor = build(config)
        set_trainable(model, config)
        groups = parameter_groups(model, config)
        parts, step_flops = describe(model, groups), StepFlops(model, config)
        if processes.is_main:
            print(parts, flush=True)

        accumulation_steps = config.global_batch_size // (config.micro_batch_size * processes.world_size)
        plan = BatchPlan(samples.lengths, config.micro_batch_size, accumulation_steps, processes.world_size,
                         config.group_by_modality_length, config.seed, samples.weights)
        if plan.samples_per_epoch < config.global_batch_size:
            raise UserError(f"data: an epoch has {plan.samples_per_epoch} samples, fewer than global_batch_size "
                            f"{config.global_batch_size}; lower global_batch_size")
        total_steps = plan.steps_per_epoch * config.epochs
        if config.max_steps:
            total_steps = min(total_steps, config.max_steps)
        check_length(config, model.config)

    cache = None
    if config.feature_cache:
        cache = fill(config.feature_cache, model, samples, processor.image_processor, config.workers, processes)
    engine = start_engine(VLMLoss(model), groups, config, accumulation_steps)
    let_sigterm_wait()
    first_step = load_checkpoint(engine, output / "checkpoints", processes)
    dataset, collate = make_dataset(config, samples, model, processor, cache)
    micro_batches = list(plan.micro_batches(processes.rank, first_step, total_steps))
    return Run(config, processes, output, dataset, model, processor, groups, parts, step_flops, engine,
               loader(dataset, collate, micro_batches, config.workers), accumulation_steps, first_step, total_steps)


def finish(run: Run, log: RunLog | None) -> None:
    """Writes the finished model and the summary; every process calls it."""
    weights = gather_weights(run.model, run.config.zero_stage, run.processes.is_main)
    if log:
        # peft keeps modules beside adapters, and LLaVA-NeXT's image_newline is none: its adapters are only merged.
        if run.config.vlm and run.config.llm_tuning in ADAPTERS and run.model.config.model_type == "llava":
            save_adapter(run.model, weights, run.config.vlm, run.output / "adapter")
        log.close(write_summary(run))
        save_vlm(run.model, weights, run.processor, run.output / "model")
        remove_checkpoints(run.output / "checkpoints")
        print(f"finished: the model is in {run.output / 'model'}, the summary in {run.output / 'summary.md'}")
    run.processes.barrier()


def check_length(config: VLMConfig, model_config: LlavaConfig | LlavaNextConfig) -> None:
    """Raises UserError if pictures leave no room for words, or if samples may be longer than the language model."""
    # With anyres a picture of a grid's own size has the most tokens.
    sizes = getattr(model_config, "image_grid_pinpoints", [None])
    picture_tokens = max(tokens_per_picture(model_config, size) for size in sizes)
    if picture_tokens + 16 > config.max_length:
        raise UserError(f"max_length: {config.max_length} leaves no room for words beside a picture, which takes "
                        f"{'up to ' if sizes != [None] else ''}{picture_tokens} tokens")
    limit = getattr(model_config.text_config, "max_position_embeddings", None)
    if limit and config.max_length > limit:
        raise UserError(f"max_length: {config.max_length} is more than the language model's {limit} positions")


def schedule(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at update `step` (from 0): linear warm-up from 0, then half a cosine."""
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * ((step - warmup) / max(1, total_steps - warmup))))


def totals(batches: list[dict[str, Any]], processes: Distributed) -> dict[str, int]:
    """The counts of the global batch: those of all micro-batches on all processes, summed."""
    names = list(batches[0]["counts"])
    values = [sum(batch["counts"][name] for batch in batches) for name in names]
    return dict(zip(names, map(int, summed(torch.tensor(values, dtype=torch.float64), processes)), strict=True))


def global_routing(micro_batches: list[torch.Tensor], processes: Distributed) -> dict[str, list]:
    """Each `[M, E + 1]`, weighted -> per MoE layer the experts' loads and the mean entropy over the global batch."""
    table = torch.stack(micro_batches).sum(0)
    table = torch.tensor(summed(table.flatten(), processes)).view_as(table)
    return {"vision_load": table[:, :-1].tolist(), "vision_entropy": table[:, -1].tolist()}
