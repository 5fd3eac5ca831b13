"""Configuration of a VLM training run. Defaults are LLaVA-1.5's stage 2 unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from clipmoe_vlm.runs import UserError
from clipmoe_vlm.tuning import TOWER_TUNING

CHOICES = {
    "template": ("plain", "v1", "chat"),
    "tower": TOWER_TUNING,
    "llm_tuning": ("frozen", "lora", "full"),
    "projector": ("train", "frozen"),
    "select_feature": ("patch", "cls_patch"),
    "image_aspect_ratio": ("square", "pad"),
    "precision": ("fp32", "bf16"),
}


@dataclass
class LoraSettings:
    """Low-rank adapters on every linear layer of the language model (never of the tower)."""

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05


@dataclass
class VLMConfig:
    """What a run reads, trains and writes.

    Start from parts (`llm` and `vision_tower`) or go on from a VLM folder (`vlm`, for instance stage 1's `model`).
    """

    output_dir: str = MISSING
    data: str = MISSING  # LLaVA JSON, or a folder written by `datasets.Dataset.save_to_disk`
    image_folder: str = ""  # where the samples' picture paths start; default: beside the data
    llm: str | None = None
    vision_tower: str | None = None  # a CLIP-MoE folder or any dense CLIP that `python -m clipmoe_vlm convert` reads
    vlm: str | None = None

    template: str = "v1"
    max_length: int = 2048  # tokens of a sample, its picture tokens included
    image_aspect_ratio: str = "pad"  # pad: to a square with the mean colour; square: resize and centre crop
    select_layer: int = -2  # the tower's hidden state that the projector reads
    select_feature: str = "patch"  # cls_patch keeps the class token

    tower: str = "frozen"  # experts: experts and routers; last_n: the last `tower_last_n` blocks that are used
    tower_last_n: int = 1
    llm_tuning: str = "full"
    projector: str = "train"
    lora: LoraSettings = field(default_factory=LoraSettings)
    learning_rate: float = 2e-5  # of the language model
    projector_learning_rate: float | None = None  # default: learning_rate
    tower_learning_rate: float | None = None  # default: learning_rate
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    router_aux_loss_coef: float = 0.01

    global_batch_size: int = 128
    micro_batch_size: int = 16  # per process; global = micro * processes * accumulation steps
    epochs: int = 1
    max_steps: int | None = None  # ends earlier; the schedule then spans these steps
    group_by_modality_length: bool = True  # batches of pictures or of text alone, of samples of similar length
    packing: bool = False  # samples of a micro-batch share rows in place of padding; the loss is the same

    precision: str = "bf16"  # fp32 on CPUs
    zero_stage: int = 2
    offload: bool = False  # optimizer state (and under ZeRO-3 parameters) in CPU memory
    gradient_checkpointing: bool = False
    workers: int = 2
    checkpoint_every: int = 500  # steps
    seed: int = 42


# Keys that may differ when a run is resumed: they do not change its result.
MAY_CHANGE = ("workers", "checkpoint_every")


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
    for key in ("max_length", "global_batch_size", "micro_batch_size", "epochs", "checkpoint_every", "tower_last_n"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}: {getattr(config, key)} must be at least 1")
    if config.max_steps is not None and config.max_steps < 1:
        raise UserError(f"max_steps: {config.max_steps} must be at least 1")
    if config.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"zero_stage: {config.zero_stage} is none of 0, 1, 2, 3")
    if config.offload and config.zero_stage == 0:
        raise UserError("offload: true needs zero_stage 1, 2 or 3")
    if config.tower == config.llm_tuning == config.projector == "frozen":
        raise UserError("tower, llm_tuning and projector are all frozen: nothing would train")
    if config.global_batch_size % (config.micro_batch_size * world_size):
        raise UserError(f"global_batch_size {config.global_batch_size} must be a multiple of micro_batch_size "
                        f"{config.micro_batch_size} times {world_size} processes")
