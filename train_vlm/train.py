"""The training loop."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from clipmoe_vlm.runs import Distributed, Metrics, UserError, prepare_output, progress, set_seed
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm.chat import ChatEncoder
from train_vlm.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from train_vlm.config import MAY_CHANGE, VLMConfig, check
from train_vlm.data import Collator, ConversationDataset
from train_vlm.engine import start_engine, start_processes, stop, summed, told_once
from train_vlm.loss import VLMLoss
from train_vlm.model import build
from train_vlm.report import write_summary
from train_vlm.sampler import BatchPlan
from train_vlm.samples import read_samples, sample_lengths
from train_vlm.saving import gather_weights, save_vlm
from train_vlm.tuning import describe, parameter_groups, set_trainable


def train(config: VLMConfig) -> None:
    """Trains a VLM from start, or from its last checkpoint, to the finished folder `output_dir/model`."""
    processes = start_processes()
    with told_once(processes):
        check(config, processes.world_size)
    output = Path(processes.main_first(partial(prepare_output, config, MAY_CHANGE)))
    if (output / "model").is_dir():
        if processes.is_main:
            print(f"{output / 'model'} is finished; remove {output} to train again")
        return

    with told_once(processes):
        samples = read_samples(config.data)
        set_seed(config.seed)
        model, processor = build(config)
        set_trainable(model, config)
        groups = parameter_groups(model, config)
        if processes.is_main:
            print(describe(model, groups), flush=True)

        accumulation_steps = config.global_batch_size // (config.micro_batch_size * processes.world_size)
        plan = BatchPlan(sample_lengths(samples), config.micro_batch_size, accumulation_steps, processes.world_size,
                         config.group_by_modality_length, config.seed)
        if len(samples) < config.global_batch_size:
            raise UserError(f"{config.data} holds {len(samples)} samples, fewer than global_batch_size "
                            f"{config.global_batch_size}; lower global_batch_size")
        total_steps = plan.steps_per_epoch * config.epochs
        if config.max_steps:
            total_steps = min(total_steps, config.max_steps)
        check_length(config, model)

    engine = start_engine(VLMLoss(model), groups, config, accumulation_steps)
    with told_once(processes):
        state = load_checkpoint(engine, output / "checkpoints", processes.world_size) or {"step": 0}
    first_step = state["step"]

    picture_tokens = tokens_per_picture(model.config)
    vision = model.config.vision_config
    dataset = ConversationDataset(
        samples, Path(config.image_folder or Path(config.data).parent),
        ChatEncoder(processor.tokenizer, processor.chat_template), processor.image_processor,
        model.config.image_token_id, picture_tokens, config.max_length)
    loader = iter(DataLoader(
        dataset, batch_sampler=plan.micro_batches(processes.rank, first_step, total_steps),
        collate_fn=Collator(processor.tokenizer.pad_token_id, (vision.num_channels, *[vision.image_size] * 2),
                             config.packing),
        num_workers=config.workers, prefetch_factor=4 if config.workers else None,
        generator=torch.Generator().manual_seed(config.seed)))  # its own: the loader must not move the model's
    # Without ZeRO in float32 DeepSpeed clips but keeps the norm to itself.
    engine_clips = config.zero_stage > 0 or config.precision != "fp32"
    trained = [parameter for group in groups for parameter in group["params"]]
    peak_rates = {group["name"]: group["lr"] for group in groups}
    metrics = None
    if processes.is_main:
        metrics = Metrics(output / "metrics.jsonl", keep=lambda row: row["step"] <= first_step)
    bar = progress(range(first_step, total_steps), description="train_vlm", total=total_steps, initial=first_step,
                   enabled=processes.is_main)

    for step in bar:
        started = time.perf_counter()
        batches = [next(loader) for _ in range(accumulation_steps)]
        counts = totals(batches, processes)
        if not counts["label_tokens"]:
            problems = [problem for batch in batches for problem in batch["problems"]]
            stop(processes, f"step {step + 1}: no sample of the batch can be used ({'; '.join(problems[:3])})")
        # Every step draws dropout from its own seed: a resumed run needs no generator state.
        torch.manual_seed((config.seed * 1_000_003 + step) * 65_537 + processes.rank)
        for group in engine.optimizer.param_groups:
            group["lr"] = peak_rates[group["name"]] * schedule(step, total_steps, config.warmup_ratio)

        losses = []
        for batch in batches:
            loss_sum, aux_loss = engine(**to_device(batch["inputs"], processes.device))
            # Each label token of the global batch weighs the same wherever it is: the engine will divide by
            # processes and micro-batches, so multiply by them first. Aux losses are averaged by pictures.
            parts = torch.stack([loss_sum / counts["label_tokens"],
                                 aux_loss * (batch["counts"]["pictures"] / max(counts["pictures"], 1))])
            losses.append(parts.detach())
            loss = parts[0] + config.router_aux_loss_coef * parts[1]
            engine.backward(loss * (processes.world_size * accumulation_steps))
            if batch is batches[-1]:
                lm_loss, aux = summed(torch.stack(losses).sum(0), processes)
                if not math.isfinite(lm_loss + aux):
                    bad = [b["ids"] for b, part in zip(batches, losses, strict=True) if not part.isfinite().all()]
                    stop(processes, f"step {step + 1}: the loss is not finite ({lm_loss}, aux {aux}); nothing was "
                                    "updated; samples: ", bad)
                if engine_clips:
                    engine.step()
                    grad_norm = float(engine.get_global_grad_norm() or 0.0)
                else:
                    grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf))
                    engine.step()
            else:
                engine.step()

        if not math.isfinite(grad_norm):
            stop(processes, f"step {step + 1}: the gradient is not finite; the last checkpoint is good; samples: ",
                 [batch["ids"] for batch in batches])
        if metrics:
            seconds = time.perf_counter() - started
            metrics.log(step=step + 1, loss=lm_loss + config.router_aux_loss_coef * aux, lm_loss=lm_loss, aux_loss=aux,
                        lr={group["name"]: group["lr"] for group in engine.optimizer.param_groups},
                        grad_norm=grad_norm, tokens_per_second=round(counts["tokens"] / seconds, 1), **counts)
            bar.set_postfix(loss=f"{lm_loss:.3f}", refresh=False)
            for problem in (problem for batch in batches for problem in batch["problems"]):
                bar.write(f"skipped sample {problem}")
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < total_steps:
            save_checkpoint(engine, output / "checkpoints", step + 1, {"step": step + 1}, processes)

    weights = gather_weights(model, config.zero_stage, processes.is_main)
    if processes.is_main:
        write_summary(output, config, describe(model, groups))
        save_vlm(model, weights, processor, output / "model")
        remove_checkpoints(output / "checkpoints")
        print(f"finished: {output / 'model'}")
    processes.barrier()


def check_length(config: VLMConfig, model: Any) -> None:
    """Raises UserError if pictures leave no room for words, or if samples may be longer than the language model."""
    picture_tokens = tokens_per_picture(model.config)
    if picture_tokens + 16 > config.max_length:
        raise UserError(f"max_length: {config.max_length} leaves no room for words beside a picture, which takes "
                        f"{picture_tokens} tokens")
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit and config.max_length > limit:
        raise UserError(f"max_length: {config.max_length} is more than the language model's {limit} positions")


def schedule(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at update `step` (from 0): linear warm-up from 0, then half a cosine."""
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def totals(batches: list[dict[str, Any]], processes: Distributed) -> dict[str, int]:
    """The counts of the global batch: those of all micro-batches on all processes, summed."""
    names = list(batches[0]["counts"])
    values = [sum(batch["counts"][name] for batch in batches) for name in names]
    return dict(zip(names, map(int, summed(torch.tensor(values, dtype=torch.float64), processes)), strict=True))


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
