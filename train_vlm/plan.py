"""What a run will need: `python -m train_vlm.plan CONFIG.yaml [key=value ...] [--gpus N] [--gpu-memory G] ...`.

Prints parameters, memory per GPU for each ZeRO stage, steps and hours. Nothing is measured and no weights are read:
the run's own code runs on the meta device, which has shapes and no numbers (`meta.py`). What that makes and keeps is
the activations' memory; what DeepSpeed keeps beside it is added by formula. FLOPs are those of `flops.py`, time is
FLOPs over what the GPUs can do times an assumed utilisation.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaNextConfig

from clipmoe_vlm.chat_templates import IMAGE_TOKEN, chat_template
from clipmoe_vlm.convert import vision_config_of
from clipmoe_vlm.planning import GPU_OVERHEAD, hours, plan_parser, read_options
from clipmoe_vlm.runs import UserError, fail, load_config
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm.anyres import tiles_per_picture
from train_vlm.chat import IGNORE_INDEX, ChatEncoder
from train_vlm.config import VLMConfig, check
from train_vlm.data import ConversationDataset
from train_vlm.engine import bucket_size
from train_vlm.flops import StepFlops
from train_vlm.meta import MetaRun, micro_batch, on_meta
from train_vlm.model import as_asked, load_tokenizer, new_config, select_features, with_own_template
from train_vlm.sampler import BatchPlan
from train_vlm.samples import picture_size, read_samples
from train_vlm.train import check_length
from train_vlm.tuning import describe, parameter_groups

# 8 A100 take 3.5 hours for LLaVA-1.5-7B's first stage and 10 for its second (LLaVA's README): 0.41 and 0.30 with the
# lengths assumed below (tests/test_plan_vlm.py).
UTILISATION = 0.33
SAMPLED = 1000  # samples whose lengths stand for all
GIB = 2**30
GATHERED = 1_000_000_000  # parameters that ZeRO-3 holds at a time, DeepSpeed's own default
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight, with the scales of blocks of 64, and theirs


@dataclass
class Lengths:
    """Of samples: what they have in the mean, and at most. Tokens include those of pictures."""

    tokens: float
    label_tokens: float
    tiles: float  # pictures, with anyres each with its tiles
    longest: int  # tokens
    most_labels: int
    largest: list[tuple[int, int]]  # (height, width) of the pictures of the sample with the most tiles

    @property
    def counts(self) -> dict[str, float]:
        """Of one sample, for `StepFlops`."""
        return {"tokens": self.tokens, "label_tokens": self.label_tokens, "tiles": self.tiles, "samples": 1}


@dataclass
class Memory:
    """Bytes on one GPU."""

    weights: float
    optimizer: float  # float32 weights and AdamW's moments
    working: float  # gradients, what autograd keeps, gathered weights: at the worst moment of a step

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.working


# --- what the run is of --------------------------------------------------------------------------------------------


def shape_of(config: VLMConfig, shape: str | None = None) -> LlavaConfig | LlavaNextConfig:
    """The VLM's configuration, without reading weights.

    Args:
        shape: a VLM's config.json to take in place of the run's own models.

    Raises:
        UserError: a part is not found or unfit.
    """
    file = Path(shape or Path(config.vlm or "") / "config.json")
    where = f"--shape: {file}" if shape else f"vlm: {file}" if config.vlm else f"llm: {config.llm}"
    try:
        if shape or config.vlm:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.get("model_type") not in ("llava", "llava_next"):
                raise UserError(f"{where} is not the config.json of a VLM (model_type 'llava' or 'llava_next')")
            model_config = as_asked(AutoConfig.for_model(**values), config, where)
        else:
            text = AutoConfig.from_pretrained(config.llm)
            text.vocab_size += 1  # for <image>
            where = f"vision_tower: {config.vision_tower}"
            model_config = new_config(vision_config_of(config.vision_tower), text, text.vocab_size - 1, config)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}; name it as it is on this machine, or give "
                        "--shape FILE, a VLM's config.json") from error
    select_features(model_config, config)
    return model_config


def assumed_lengths(config: VLMConfig, model_config: LlavaConfig | LlavaNextConfig) -> Lengths:
    """Without the data: a picture each, with anyres one of the most tokens; captions (`plain`) of 30 tokens, 100 at
    most, or conversations of 200, half of them answers, the longest as long as is allowed."""
    sizes = getattr(model_config, "image_grid_pinpoints", [[model_config.vision_config.image_size] * 2])
    size = max(map(tuple, sizes), key=partial(tokens_per_picture, model_config))
    picture, tiles = tokens_per_picture(model_config, size), tiles_per_picture(model_config, size)
    if config.template == "plain":
        return Lengths(picture + 30, 30, tiles, min(picture + 100, config.max_length), 100, [size])
    return Lengths(picture + 200, 100, tiles, config.max_length, max(config.max_length - picture, 0) // 2, [size])


class _SizesAlone(ConversationDataset):
    """Samples as the run has them, but of pictures only the headers are read, and tiles are empty."""

    def __init__(self, model_config: LlavaConfig | LlavaNextConfig, *args: Any):
        super().__init__(*args)
        self.model_config = model_config

    def _prepare(self, picture: Any) -> tuple[Tensor, tuple[int, int]]:
        size = picture_size(picture)
        return torch.empty(tiles_per_picture(self.model_config, size), 0), size


def read_lengths(config: VLMConfig, model_config: LlavaConfig | LlavaNextConfig) -> tuple[int, Lengths]:
    """How many samples an epoch of the run's data has, and the lengths of `SAMPLED` of them by the run's own encoder.

    Raises:
        UserError: unusable data, no tokenizer where the model's configuration was found, or no usable sample.
    """
    source = Path(config.vlm or config.llm)
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} has no tokenizer to measure the data with") from error
    if config.vlm:
        with_own_template(tokenizer, source)
    encoder = ChatEncoder(tokenizer, chat_template(config.template, tokenizer))
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    with tempfile.TemporaryDirectory() as folder:
        samples = read_samples(config.data, config.image_folder, Path(folder))
        dataset = _SizesAlone(model_config, samples, encoder, None, token, partial(tokens_per_picture, model_config),
                              config.max_length)
        epoch = BatchPlan(samples.lengths, 1, 1, 1, False, config.seed, samples.weights).order(0)
        items = [item for item in map(dataset.__getitem__, epoch[:SAMPLED]) if "problem" not in item]
    if not items:  # training skips those with a problem, too
        raise UserError(f"data: none of {min(SAMPLED, len(epoch))} samples can be used")
    tokens = [len(item["input_ids"]) for item in items]
    labels = [int((item["labels"][1:] != IGNORE_INDEX).sum()) for item in items]
    tiles = [len(item.get("pictures", ())) for item in items]
    largest = items[tiles.index(max(tiles))].get("image_sizes", [])
    tokens_mean, labels_mean, tiles_mean = (sum(column) / len(items) for column in (tokens, labels, tiles))
    return len(epoch), Lengths(tokens_mean, labels_mean, tiles_mean, max(tokens), max(labels), largest)


# --- memory --------------------------------------------------------------------------------------------------------


class Footprint:
    """What a process holds of the model and of a micro-batch of samples that are all as large as the largest."""

    def __init__(self, model_config: LlavaConfig | LlavaNextConfig, config: VLMConfig, gpus: int, lengths: Lengths):
        module = on_meta(model_config, config)
        labelled = min(lengths.most_labels, lengths.longest - 1)
        with MetaRun(module) as run:
            losses = module(**micro_batch(module, config, lengths.longest, labelled, lengths.largest))
            torch.autograd.backward(losses[0] + losses[1].sum())
        self.module, self.config, self.gpus, self.run = module, config, gpus, run
        self.size = 4 if config.precision == "fp32" else 2
        self.weights = sum(parameter.nbytes for parameter in module.parameters())
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
        self.trained, self.largest = sum(trained), max(trained)
        if config.llm_tuning == "qlora":
            adapted = [part.base_layer.weight for part in module.model.modules() if hasattr(part, "base_layer")]
            self.weights -= sum(weight.nbytes - FOUR_BITS * weight.numel() for weight in adapted)
            run.peak += max(weight.nbytes for weight in adapted)  # 16 bits again for its product
        self.stages = range(3 if config.llm_tuning == "qlora" else 4)  # those that the run may ask for
        self.accumulates = config.global_batch_size > config.micro_batch_size * gpus

    def memory(self, stage: int) -> Memory:
        """On one GPU, under a ZeRO stage: the worst of the backward and of AdamW's update, after which it is over."""
        share = self.trained / (self.gpus if stage else 1)  # of which this process does the update
        gradients, bucket = self.size * self.trained, self.size * bucket_size(self.trained)
        weights = self.weights / (self.gpus if stage == 3 else 1)
        masters = 4 * share if stage or self.size < 4 else 0
        if stage < 2:
            kept = self.run.peak + gradients if self.accumulates else self.run.peak_with_gradients
            backward = max(kept, gradients + (bucket if self.gpus > 1 else 0))
        elif stage == 2 and not self.accumulates:  # this process's gradients grow as activations go
            backward = bucket + max(self.run.peak, self.size * share)
        else:
            backward = bucket + self.run.peak + self.size * share
        # Gradients in float32 and a root of AdamW's second moments. ZeRO-3 takes a billion numbers at a time.
        at_once = min(share, GATHERED) if stage == 3 else share
        update = (gradients if stage == 0 else self.size * share) + 8 * at_once
        if stage == 3:
            gathered = self.size * min(self.parameters, GATHERED)
            backward, update = backward + gathered, update + self.size * min(self.trained, GATHERED)
        optimizer = masters + 8 * share
        if self.config.offload and stage:  # in CPU memory, updated there
            optimizer, update = 0, 0
            backward -= self.size * share if stage >= 2 else 0
            weights = 0 if stage == 3 else weights
        working = max(backward, update)
        if stage == 3:  # DeepSpeed first puts the whole model on each GPU, then divides it
            working = max(working, self.weights - weights - optimizer)
        return Memory(weights, optimizer, working)


# --- what is printed -----------------------------------------------------------------------------------------------


def plan(config: VLMConfig, *, gpus: int, gpu_memory: float, samples: int | None, tokens: int | None, shape: str | None,
         tflops: float, utilisation: float) -> list[str]:
    """The lines to print.

    Args:
        gpu_memory: of one GPU, in GiB.
        samples: how many there are, to plan without the data.
        tokens: of a sample, its picture's included; None: as the data say, or an assumption.
        shape: see `shape_of`.
        tflops: what one GPU can do, in 10^12 FLOPs per second.
        utilisation: the share of that which training reaches.

    Raises:
        UserError: values that cannot work, a model that is not found, or nothing that tells how many samples there are.
    """
    check(config, gpus)
    model_config = shape_of(config, shape)
    check_length(config, model_config)
    if samples:
        lengths, of_lengths = assumed_lengths(config, model_config), "assumed"
    elif shape:
        raise UserError("--shape has no tokenizer to measure the data with: say how many samples there are with "
                        "--samples N")
    else:
        try:
            samples, lengths = read_lengths(config, model_config)
        except UserError as error:
            raise UserError(f"{error}; to plan without the data, give --samples N") from error
        of_lengths = f"of {min(samples, SAMPLED):,} of the run's samples"
    if tokens:
        lengths, of_lengths = replace(lengths, tokens=tokens, longest=max(tokens, lengths.longest)), "as asked for"
    footprint = Footprint(model_config, config, gpus, lengths)
    model = footprint.module.model
    steps = -(-samples // config.global_batch_size) * config.epochs
    seen = samples * config.epochs
    if config.max_steps and config.max_steps < steps:
        steps, seen = config.max_steps, config.max_steps * config.global_batch_size
    flops = StepFlops(model, config)(lengths.counts)
    memories = {stage: footprint.memory(stage) for stage in footprint.stages}
    return [
        describe(model, parameter_groups(model, config)),
        "",
        f"tokens of a sample: {lengths.tokens:.0f}, of which {lengths.label_tokens:.0f} with a label, and "
        f"{lengths.longest} of the longest; pictures or tiles: {lengths.tiles:.1f} ({of_lengths})",
        "",
        *_table(memories, config, gpus, lengths),
        "",
        *_verdict(memories, footprint, model_config, lengths, gpu_memory),
        "",
        f"steps: {steps:,} of {config.global_batch_size} samples, {flops / 1e12:.3g} TFLOP a sample",
        f"time on {gpus} x {tflops:g} TFLOP/s at {utilisation:.0%}: "
        f"{hours(flops * seen, gpus, tflops, utilisation):.1f} h",
    ]


def _table(memories: dict[int, Memory], config: VLMConfig, gpus: int, lengths: Lengths) -> list[str]:
    rows = [("weights", "weights"), ("optimizer", "optimizer"), ("gradients, activations", "working")]
    lines = [f"GiB per GPU, {gpus} of them, {config.micro_batch_size} samples of {lengths.longest} tokens at once",
             f"{'':<24}" + "".join(f"{f'ZeRO {stage}':>9}" for stage in memories)]
    for title, name in rows:
        lines.append(f"{title:<24}" + "".join(f"{getattr(m, name) / GIB:>9.1f}" for m in memories.values()))
    lines.append(f"{'CUDA and libraries':<24}" + f"{GPU_OVERHEAD / GIB:>9.1f}" * len(memories))
    lines.append(f"{'together':<24}" + "".join(f"{(m.total + GPU_OVERHEAD) / GIB:>9.1f}" for m in memories.values()))
    return lines


def _verdict(memories: dict[int, Memory], footprint: Footprint, model_config: LlavaConfig | LlavaNextConfig,
             lengths: Lengths, gpu_memory: float) -> list[str]:
    """Which stages fit, and what to change if the run's own does not."""
    config = footprint.config
    fits = [stage for stage in memories if _fits(memories[stage], config, stage, gpu_memory)]
    names = ", ".join(map(str, fits))
    own = f"this run asks for ZeRO {config.zero_stage}"
    if config.zero_stage in fits:
        return [f"ZeRO {names} fit in {gpu_memory:g} GiB; {own}"]
    if fits:
        return [f"ZeRO {names} fit in {gpu_memory:g} GiB, but {own}: set zero_stage={fits[0]}"]
    lines = [f"no ZeRO stage fits in {gpu_memory:g} GiB"]
    small = {"gradient_checkpointing": True, "micro_batch_size": 1}
    remedies = [{"gradient_checkpointing": True}, small, small | {"offload": True}]
    remedies += [small | {"llm_tuning": "lora"}] if config.llm_tuning == "full" else []
    remedies += [small | {"llm_tuning": "qlora"}] if config.llm_tuning != "frozen" else []
    for changes in remedies:
        if any(getattr(config, key) != value for key, value in changes.items()):
            other = Footprint(model_config, replace(copy.deepcopy(config), **changes), footprint.gpus, lengths)
            stage = max(other.stages)
            memory = other.memory(stage)
            words = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            lines.append(f"with zero_stage={stage} {words}: {(memory.total + GPU_OVERHEAD) / GIB:.1f} GiB")
            if _fits(memory, other.config, stage, gpu_memory):
                return lines
    return [*lines, "take more GPUs, larger ones, or a smaller model"]


def _fits(memory: Memory, config: VLMConfig, stage: int, gpu_memory: float) -> bool:
    return memory.total + GPU_OVERHEAD <= gpu_memory * GIB and not (config.offload and stage == 0)


def main(arguments: list[str]) -> None:
    parser = plan_parser("train_vlm.plan", __doc__.split(":")[0], UTILISATION, "between LLaVA-1.5's two stages")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of one GPU (default: 80)")
    parser.add_argument("--samples", type=int, help="how many, to plan without the data")
    parser.add_argument("--tokens", type=int, help="of a sample, its picture's included (default: as the data say)")
    parser.add_argument("--shape", help="config.json of a VLM to take in place of the run's models")
    options, others = read_options(parser, arguments)
    config = load_config(VLMConfig, others, "python -m train_vlm.plan")
    print("\n".join(plan(config, **vars(options))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
