"""The one training loop: MCL stages, router tuning, direct fine-tuning and sparse upcycling are all this loop."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.loading import loader
from clipmoe_vlm.runs import (
    Distributed,
    UserError,
    load_checkpoint,
    progress,
    save_checkpoint,
    stage_seed,
    write_json,
)
from clipmoe_vlm.sigterm import sigterm_asked

from .config import EncoderConfig, MCLConfig, RouterConfig
from .data import Collate, Pairs, Samples
from .features import autocast
from .loss import total_loss
from .routers import BiasBalancing
from .sampler import cluster_batches, rank_slice
from .step import encode_by_base, step_gradients
from .trackers import StageLog


@dataclass
class Run:
    """What every part of a run shares."""

    config: EncoderConfig
    distributed: Distributed
    folder: Path
    samples: Samples
    collate: Collate


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Of update `step` (from 1): linear warm-up to `peak` over `warmup` updates, then a cosine to zero at `total`."""
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1, total - warmup)))


def steps_per_pass(labels: np.ndarray, batch_size: int) -> int:
    """Global batches of one pass over the clusters, without drawing them."""
    _, sizes = np.unique(labels[labels >= 0], return_counts=True)
    return int((sizes // batch_size).sum())


def train(stage: str, model: CLIPMoEModel, trainable: dict[str, nn.Parameter], labels: np.ndarray,
          settings: MCLConfig | RouterConfig, run: Run, folder: Path) -> int:
    """Trains `trainable` (everything else is frozen) and returns the number of updates made in all.

    Nothing random outlives a step: batches follow from (seed, stage, pass), dropout from (seed, stage, step, rank,
    micro-batch). So a run resumed from `folder/checkpoint.safetensors` ends with the very bits of an unbroken one.

    Args:
        labels: [N] cluster of each sample that batches are drawn from (see `cluster_batches`).

    Raises:
        UserError: the loss or a gradient is not finite; the update is not made. Or a checkpoint cannot be used.
        SystemExit: SIGTERM came; a checkpoint is saved.
    """
    config, distributed = run.config, run.distributed
    world_size, device = distributed.world_size, distributed.device
    model.to(device).train().requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    parameters = list(trainable.values())
    balancing = BiasBalancing(model, config.router.bias_rate)
    base = CLIPMoEModel.from_pretrained(run.folder / "base").to(device).eval() if settings.distillation else None
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        model.vision_model.compile()
        model.text_model.compile()
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, (0.9, 0.999),
                                  weight_decay=settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    seed = stage_seed(config.seed, stage)
    per_pass = steps_per_pass(labels, settings.batch_size)
    total = settings.max_steps or settings.epochs * per_pass
    checkpoint = folder / "checkpoint.safetensors"
    log = StageLog(stage, model, run) if distributed.is_main else None  # it keeps the routers' start
    resumed = load_checkpoint(checkpoint, trainable, optimizer)
    step = int(resumed["step"]) if resumed else 0
    if step != distributed.main_first(lambda: step):
        raise UserError(f"{checkpoint} is not the same for all processes; output_dir must lie on a file system that "
                        "all nodes share (if it does, try again: the file may be too new to be seen everywhere)")
    if resumed:
        scaler.load_state_dict(json.loads(resumed["scaler"]))
        balancing.restore(resumed["balance_biases"])
    if log:
        log.open(step)
        count = sum(parameter.numel() for parameter in parameters)
        print(f"{stage}: {total} updates of {settings.batch_size} samples, {count:,} of "
              f"{sum(p.numel() for p in model.parameters()):,} parameters train"
              + (f", resuming after update {step}" if step else ""), flush=True)
        if settings.warmup_steps >= total:
            print(f"{stage}: note: warmup_steps ({settings.warmup_steps}) is not below the {total} updates, so the "
                  "learning rate never gets beyond its warm-up", flush=True)
    scale = model.logit_scale.exp().item() if config.logit_scale is None else config.logit_scale
    loss_of = partial(total_loss, logit_scale=scale, label_smoothing=settings.label_smoothing,
                      balance_coef=config.router.balance_coef, z_loss_coef=config.router.z_loss_coef,
                      world_size=world_size, balance_by_loss=config.router.balancing == "loss",
                      distillation=settings.distillation)
    bar = progress(description=stage, total=total, initial=step, enabled=distributed.is_main)

    while step < total:
        epoch, done = divmod(step, per_pass)
        batches = cluster_batches(labels, settings.batch_size, seed=seed, epoch=epoch)[done:done + total - step]
        share = rank_slice(batches, distributed.rank, world_size)
        for numbers, batch in zip(batches, loader(Pairs(run.samples), run.collate, share, config.workers), strict=True):
            started = time.perf_counter()
            step += 1
            for sentence in batch["errors"]:
                print(f"{stage}, step {step}: skipped {sentence}", flush=True)
            lr = learning_rate(step, total, settings.learning_rate, settings.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            optimizer.zero_grad(set_to_none=True)
            memory = {"micro_batch_size": config.micro_batch_size, "amp": autocast(distributed, config.precision)}
            of_base = None if base is None else encode_by_base(base, batch, **memory)
            losses = step_gradients(model, batch, partial(loss_of, base=of_base), scaler=scaler,
                                    seed=stage_seed(seed, step, distributed.rank), **memory)
            average_gradients(parameters, world_size)
            values = mean_over_ranks({**losses, "skipped": (~batch["valid"]).float().mean(),
                                      "sigterm": torch.tensor(float(sigterm_asked()))}, distributed)
            if not math.isfinite(values["loss"]):
                stop_non_finite(f"loss is {values['loss']}", stage, step, numbers, run, folder)
            scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
            # In fp16 a gradient beyond the format's range is routine: the scaler leaves that update out.
            if not math.isfinite(norm) and config.precision != "fp16":
                stop_non_finite(f"gradient norm is {norm}", stage, step, numbers, run, folder)
            scaler.step(optimizer)
            scaler.update()
            balancing.update(world_size)

            stopping = values.pop("sigterm") > 0  # the same on all ranks, whichever of them the signal reached
            if log:
                values["skipped"] = round(values["skipped"] * settings.batch_size)
                log.update(step, epoch=epoch, **values, lr=lr, grad_norm=norm,
                           samples_per_second=round(settings.batch_size / (time.perf_counter() - started), 2))
                log.update_routing(step, total, batch)
                if stopping or step % config.checkpoint_every == 0 and step < total:
                    save_checkpoint(checkpoint, trainable, optimizer, step=step,
                                    scaler=json.dumps(scaler.state_dict()), balance_biases=balancing.state())
            if stopping:
                bar.close()
                distributed.barrier()
                if distributed.is_main:
                    print(f"{stage}: stopped by SIGTERM after update {step} of {total}; the same command goes on from "
                          "there", flush=True)
                raise SystemExit(0)
            bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)
            bar.update()
    bar.close()
    if log:
        log.close()
    return total


def mean_over_ranks(values: dict[str, Tensor], distributed: Distributed) -> dict[str, float]:
    mean = torch.stack([value.to(distributed.device) for value in values.values()])
    if distributed.world_size > 1:
        dist.all_reduce(mean)
    return dict(zip(values, (mean / distributed.world_size).tolist(), strict=True))


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Replaces each gradient by its mean over ranks; a parameter that this rank's batch did not touch has zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size == 1:
        return
    pending = [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters]
    for parameter, work in zip(parameters, pending, strict=True):
        work.wait()
        parameter.grad /= world_size


def stop_non_finite(what: str, stage: str, step: int, numbers: np.ndarray, run: Run, folder: Path) -> None:
    """Ends the run before the update, naming the step and the samples of the global batch (all of them in a file)."""

    def tell() -> None:
        write_json(file, {"stage": stage, "step": step, "what": what, "ids": ids})
        raise UserError(
            f"{stage}, step {step}: the {what}; no update was made. Samples of the batch: {', '.join(ids[:8])}"
            f"{f' and {len(ids) - 8} more' if len(ids) > 8 else ''} (all in {file}). Look at them, or use precision: "
            "fp32 or a smaller learning rate in a new output_dir")

    ids = [run.samples.record(number)["id"] for number in numbers]
    file = folder / "non_finite.json"
    run.distributed.main_first(tell)
