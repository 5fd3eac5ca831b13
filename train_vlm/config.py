"""Configuration of a VLM training run. Defaults are LLaVA-1.5's stage 2 unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from clipmoe_vlm.runs import UserError
from clipmoe_vlm.trackers import check_trackers
from clipmoe_vlm.tuning import TOWER_TUNING

CHOICES = {
    "template": ("plain", "v1", "chat"),
    "tower": TOWER_TUNING,
    "llm_tuning": ("frozen", "lora", "dora", "qlora", "full"),
    "projector": ("train", "frozen"),
    "select_feature": ("patch", "cls_patch"),
    "loss_normalization": ("tokens", "llava"),
    "image_aspect_ratio": ("square", "pad", "anyres"),
    "precision": ("fp32", "bf16"),
}


@dataclass
class LoraSettings:
    """Low-rank adapters on every linear layer of the language model (never of the tower)."""

    r: int = 128  # rank
    alpha: int = 256  # the adapter's product is scaled by alpha / r
    dropout: float = 0.05


@dataclass
class VLMConfig:
    """What a run reads, trains and writes.

    Start from parts (`llm` and `vision_tower`) or go on from a VLM folder (`vlm`, for instance stage 1's `model`).
    """

    output_dir: str = MISSING  # on several machines: on a file system that all of them share
    # LLaVA JSON, a folder written by `datasets.Dataset.save_to_disk`, or a list of {path, image_folder, weight}
    data: Any = MISSING
    image_folder: str = ""  # where picture paths start, of sources without their own; default: beside the data
    llm: str | None = None  # a causal language model of transformers', folder or name on the hub
    vision_tower: str | None = None  # a CLIP-MoE folder or any dense CLIP that `python -m clipmoe_vlm convert` reads
    vlm: str | None = None  # the `model` folder of an earlier run, or what `clipmoe_vlm convert-vlm` wrote

    template: str = "v1"  # plain: captions alone (stage 1); v1: Vicuna's; chat: the language model's own
    max_length: int = 2048  # tokens of a sample, its picture tokens included
    # pad: to a square with the mean colour; square: resize and centre crop; anyres: the whole picture and its tiles
    image_aspect_ratio: str = "pad"
    # anyres: sizes [width, height] that pictures are fitted into, in multiples of the tower's size, in LLaVA's order
    # (the first of equals wins). Default: 1x2, 2x1, 2x2, 3x1 and 1x3 tiles, or what the folder `vlm` was trained with.
    image_grid_pinpoints: list[list[int]] | None = None
    select_layer: int = -2  # the tower's hidden state that the projector reads
    select_feature: str = "patch"  # cls_patch keeps the class token

    tower: str = "frozen"  # routers; experts: and routers; last_n: the last `tower_last_n` blocks in use; full
    tower_last_n: int = 1
    llm_tuning: str = "full"  # lora, dora: adapters; qlora: adapters on a base in 4 bits; frozen
    projector: str = "train"  # or frozen
    lora: LoraSettings = field(default_factory=LoraSettings)
    learning_rate: float = 2e-5  # of the language model
    projector_learning_rate: float | None = None  # default: learning_rate
    tower_learning_rate: float | None = None  # default: learning_rate
    warmup_ratio: float = 0.03  # share of the updates in which rates rise from 0; then half a cosine, down to 0
    weight_decay: float = 0.0  # of all but norms and biases
    max_grad_norm: float = 1.0  # 0: no clipping
    # tokens: every label token of the global batch weighs the same; llava: every micro-batch does
    loss_normalization: str = "tokens"
    # Of the tower's balance loss and z-loss, whenever routers train; the tower's own coefficient is not used.
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0

    global_batch_size: int = 128  # samples of an update
    micro_batch_size: int = 16  # per process; global = micro * processes * accumulation steps, which follow from it
    epochs: int = 1
    max_steps: int | None = None  # ends earlier; the schedule then spans these steps
    group_by_modality_length: bool = True  # batches of pictures or of text alone, of samples of similar length
    packing: bool = True  # a micro-batch's samples in one row instead of padded ones; the same loss in less time
    liger: bool = False  # Liger's kernels in the language model's layers (GPUs only)

    feature_cache: str | None = None  # folder for a frozen tower's features, computed once and read by all runs
    precision: str = "bf16"  # fp32 on CPUs
    zero_stage: int = 2  # processes share optimizer state (1), gradients too (2), weights too (3); 0: nothing
    offload: bool = False  # optimizer state (and under ZeRO-3 parameters) in CPU memory
    gradient_checkpointing: bool = False  # blocks run again in the backward: less memory, more time
    workers: int = 2  # processes that read pictures, beside each process that trains
    checkpoint_every: int = 500  # steps
    log_routing_every: int = 50  # steps between two lines of routing.jsonl, if the tower has experts
    seed: int = 42  # of new weights, the order of samples and dropout

    validation_data: str | None = None  # held-out samples: LLaVA JSON or a folder of `datasets`
    validation_every: int = 500  # steps; also before the first and after the last
    answers: int = 0  # so many questions of the held-out (else training) data are answered then, and at steps 10, 100
    evaluation: str | None = None  # a configuration of eval_vlm: its suites score the model at the end
    evaluation_every: int | None = None  # steps; ... and in between
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb: they get what metrics.jsonl gets


# Keys that may differ when a run is resumed: they do not change its result, or by rounding alone.
MAY_CHANGE = ("workers", "checkpoint_every", "zero_stage", "offload", "gradient_checkpointing", "log_routing_every",
              "validation_data", "validation_every", "answers", "evaluation", "evaluation_every", "trackers")


def check(config: VLMConfig, world_size: int) -> None:
    """Checks values and how they fit together.

    Raises:
        UserError: naming the key, what it holds and what it may hold.
    """
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise UserError(f"{key}: {getattr(config, key)!r} is none of {', '.join(choices)}")
    if config.vlm and (config.llm or config.vision_tower):
        raise UserError("vlm already holds a language model and a tower: give either vlm, or llm and vision_tower")
    if not config.vlm and not (config.llm and config.vision_tower):
        raise UserError("nothing to start from: give llm and vision_tower, or vlm (the model folder of stage 1)")
    for key in ("max_length", "global_batch_size", "micro_batch_size", "epochs", "checkpoint_every", "tower_last_n",
                "log_routing_every", "validation_every", "max_steps", "evaluation_every"):
        if (value := getattr(config, key)) is not None and value < 1:
            raise UserError(f"{key}: {value} must be at least 1")
    for key in ("answers", "weight_decay", "max_grad_norm", "workers", "learning_rate", "projector_learning_rate",
                "tower_learning_rate", "router_aux_loss_coef", "router_z_loss_coef"):
        if (value := getattr(config, key)) is not None and value < 0:
            raise UserError(f"{key}: {value} must be at least 0")
    if not 0 <= config.warmup_ratio < 1:
        raise UserError(f"warmup_ratio: {config.warmup_ratio} must be at least 0 and below 1, a share of the updates")
    if config.lora.r < 1:
        raise UserError(f"lora.r: {config.lora.r} must be at least 1")
    if config.evaluation_every and not config.evaluation:
        raise UserError("evaluation_every: there is no evaluation to take; set evaluation to a configuration of "
                        "eval_vlm")
    if config.image_grid_pinpoints and config.image_aspect_ratio != "anyres":
        raise UserError(f"image_grid_pinpoints is for image_aspect_ratio: anyres, not {config.image_aspect_ratio}")
    check_trackers(config.trackers)
    if config.feature_cache and config.tower != "frozen":
        raise UserError(f"feature_cache: a tower that trains (tower: {config.tower}) has new features at each step; "
                        "leave feature_cache out, or set tower: frozen")
    if config.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"zero_stage: {config.zero_stage} is none of 0, 1, 2, 3")
    if config.offload and config.zero_stage == 0:
        raise UserError("offload: true needs zero_stage 1, 2 or 3")
    if config.llm_tuning == "qlora" and config.zero_stage == 3:
        raise UserError("llm_tuning: qlora does not go with zero_stage 3, which can't split 4-bit weights; use "
                        "zero_stage 2, or llm_tuning: lora")
    if config.tower == config.llm_tuning == config.projector == "frozen":
        raise UserError("tower, llm_tuning and projector are all frozen: nothing would train")
    if config.global_batch_size % (config.micro_batch_size * world_size):
        raise UserError(f"global_batch_size {config.global_batch_size} must be a multiple of micro_batch_size "
                        f"{config.micro_batch_size} times {world_size} processes")
