"""Every setting of train_encoder. The defaults are the constants of the paper's public code (arXiv 2409.19291v3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from clipmoe_vlm.runs import Distributed, UserError

METHODS = ("dmu", "direct", "sparse_upcycling", "mcl_random_batches", "without_mcl")
# What a resumed run may change without changing its result.
MAY_CHANGE = ("workers", "checkpoint_every")


@dataclass
class MCLConfig:
    """One stage of multistage contrastive learning; direct fine-tuning and sparse upcycling take these values too."""

    batch_size: int = 800  # global: over all processes
    learning_rate: float = 1e-5
    weight_decay: float = 0.2
    warmup_steps: int = 200
    epochs: int = 1
    max_steps: int | None = None  # wins over epochs; starts a new pass whenever the data is used up
    label_smoothing: float = 0.1


@dataclass
class RouterConfig:
    """Router tuning: contrastive loss + balance_coef * (image balance + text balance / 2)."""

    batch_size: int = 800
    learning_rate: float = 1e-6
    weight_decay: float = 1e-2
    warmup_steps: int = 200
    epochs: int = 1
    max_steps: int | None = None
    label_smoothing: float = 0.1
    balance_coef: float = 0.01
    z_loss_coef: float = 0.0  # weight of the router z-loss inside the balance term
    expert_dropout: float = 0.1


@dataclass
class EncoderConfig:
    """A whole run. Relative picture paths are looked up in `image_root`, or beside the file that names them."""

    model: str = MISSING  # a dense CLIP: any source that `python -m clipmoe_vlm convert` takes
    output_dir: str = MISSING
    train_data: str = MISSING  # captions file (.csv .tsv .jsonl .json), tar shards ("x-{000..099}.tar") or their folder
    architecture: str | None = None  # for open_clip weight files that do not name their own
    method: str = "dmu"
    image_root: str | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    validation_data: str | None = None
    hard_captions: str | None = None

    num_experts: int = 4
    top_k: int = 2
    num_clusters: int = 3  # per modality and stage
    first_moe_layer: int = 0  # of the vision tower; the text tower is MoE in every block
    init_from: str = "base"  # base | previous: what an MCL stage starts from
    small_clusters: str = "drop"  # drop | merge: clusters smaller than a batch
    logit_scale: float | None = 100.0  # fixed in all stages, as in the public code; null: the base's own
    text_length: int | None = 248  # positions to stretch the text tower to (as Long-CLIP does); null: as the base

    mcl: MCLConfig = field(default_factory=MCLConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    precision: str = "fp32"  # fp32 | bf16 | fp16
    seed: int = 0
    workers: int = 4
    checkpoint_every: int = 500


def check(config: EncoderConfig, distributed: Distributed) -> None:
    """Refuses values that cannot work, each with a sentence that names the key.

    Raises:
        UserError: the first such value.
    """
    for key, allowed in (("method", METHODS), ("init_from", ("base", "previous")),
                         ("small_clusters", ("drop", "merge")), ("precision", ("fp32", "bf16", "fp16"))):
        if getattr(config, key) not in allowed:
            raise UserError(f"{key}: {getattr(config, key)!r} is not one of {', '.join(allowed)}")
    for key, least in (("num_experts", 2), ("top_k", 1), ("num_clusters", 1), ("checkpoint_every", 1), ("workers", 0),
                       ("first_moe_layer", 0)):
        if getattr(config, key) < least:
            raise UserError(f"{key}: {getattr(config, key)} must be at least {least}")
    if config.top_k > config.num_experts:
        raise UserError(f"top_k: a token cannot go to {config.top_k} of num_experts={config.num_experts} experts")
    if config.precision == "fp16" and distributed.device.type != "cuda":
        raise UserError("precision: fp16 needs a GPU; use fp32 here")
    world_size = distributed.world_size
    for name, part in (("mcl", config.mcl), ("router", config.router)):
        if part.batch_size < 2 * world_size or part.batch_size % world_size:
            raise UserError(f"{name}.batch_size: {part.batch_size} must be a multiple of the {world_size} processes, "
                            "with at least 2 samples for each")
        if part.epochs < 1 or (part.max_steps is not None and part.max_steps < 1):
            raise UserError(f"{name}.epochs and {name}.max_steps must be at least 1")
