"""Every setting of train_encoder. The defaults are the constants of the paper's public code (arXiv 2409.19291v3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from omegaconf import MISSING

from clipmoe_vlm.runs import Distributed, UserError
from clipmoe_vlm.trackers import check_trackers

AUTO_CLUSTERS = range(2, 7)  # what `num_clusters: auto` chooses from
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METHODS = ("dmu", "direct", "sparse_upcycling", "mcl_random_batches", "without_mcl")
# What a resumed run may change: the last two change its result by no more than rounding and draws of dropout, and a run
# out of memory at hour 9 needs the micro-batches.
MAY_CHANGE = ("workers", "checkpoint_every", "log_routing_every", "trackers", "gradient_checkpointing",
              "micro_batch_size", "compile")


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
    distillation: float = 0.0  # weight of what keeps the base's right matches (loss.distillation_loss)


@dataclass
class RouterConfig:
    """Router tuning: contrastive loss + balance_coef * (image balance + text balance / 2).

    The keys from `init` on are not the paper's (docs/method.md, "Beyond the paper").
    """

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
    init: str = "random"  # random | centroids: of clusters of what the base's feed-forward layers see
    balancing: str = "loss"  # loss | bias: in its place a bias on the choice of experts, moved after each update
    bias_rate: float = 1e-3  # how far an update moves that bias, in units of the router's logits
    base_gate: float | None = None  # share of the base at the start of a gate between base and experts; null: no gate
    distillation: float = 0.0  # as in mcl


@dataclass
class EncoderConfig:
    """A whole run. Relative picture paths are looked up in `image_root`, or beside the file that names them."""

    model: str = MISSING  # a dense CLIP: any source that `python -m clipmoe_vlm convert` takes
    output_dir: str = MISSING
    train_data: str = MISSING  # captions file, tar shards ("x-{000..099}.tar"), parquet, or a folder: see docs/data.md
    architecture: str | None = None  # for open_clip weight files that do not name their own
    method: str = "dmu"
    image_root: str | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    short_captions: str | None = None  # first_sentence, or a column: short captions beside the long ones (Long-CLIP)
    validation_data: str | None = None  # as train_data, or a JSON of Karpathy's
    validation_split: str = "test"  # of a JSON of Karpathy's
    hard_captions: str | None = None

    num_experts: int = 4
    top_k: int = 2
    num_clusters: int | str = 3  # per modality and stage; auto: 2 to 6 by silhouette, for each modality and stage
    stage_features: str = "last"  # last | all: a stage clusters features of the model before it, or of all so far
    first_moe_layer: int = 0  # of the vision tower; the text tower is MoE in every block
    init_from: str = "base"  # base | previous: what an MCL stage starts from
    small_clusters: str = "drop"  # drop | merge: clusters smaller than a batch
    logit_scale: float | None = 100.0  # fixed in all stages, as in the public code; null: the base's own
    text_length: int | None = 248  # positions to stretch the text tower to (as Long-CLIP does); null: as the base

    mcl: MCLConfig = field(default_factory=MCLConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    precision: str = "fp32"  # fp32 | bf16 | fp16
    micro_batch_size: int | None = None  # samples of one forward per process, by gradient caching; null: all at once
    gradient_checkpointing: bool = False  # a block's activations are computed again in the backward: less memory
    compile: bool = False  # torch.compile of both towers while they train
    seed: int = 0
    workers: int = 4
    checkpoint_every: int = 500
    log_routing_every: int = 50  # updates between two lines of routing.jsonl while routers train
    trackers: list[str] = field(default_factory=list)  # tensorboard, wandb: they get what metrics.jsonl gets


def check(config: EncoderConfig, distributed: Distributed) -> None:
    """Refuses values that cannot work, each with a sentence that names the key.

    Raises:
        UserError: the first such value.
    """
    for key, allowed in (("method", METHODS), ("init_from", ("base", "previous")),
                         ("stage_features", ("last", "all")), ("small_clusters", ("drop", "merge"))):
        if getattr(config, key) not in allowed:
            raise UserError(f"{key}: {getattr(config, key)!r} is not one of {', '.join(allowed)}")
    router = config.router
    for key, allowed in (("init", ("random", "centroids")), ("balancing", ("loss", "bias"))):
        if getattr(router, key) not in allowed:
            raise UserError(f"router.{key}: {getattr(router, key)!r} is not one of {', '.join(allowed)}")
    if router.bias_rate <= 0:
        raise UserError(f"router.bias_rate: {router.bias_rate} must be above 0")
    if router.base_gate is not None and not 0 < router.base_gate < 1:
        raise UserError(f"router.base_gate: {router.base_gate} must lie between 0 and 1, both excluded")
    for key, least in (("num_experts", 2), ("top_k", 1), ("checkpoint_every", 1), ("log_routing_every", 1),
                       ("workers", 0), ("first_moe_layer", 0)):
        if getattr(config, key) < least:
            raise UserError(f"{key}: {getattr(config, key)} must be at least {least}")
    clusters = max(AUTO_CLUSTERS) if config.num_clusters == "auto" else config.num_clusters
    if isinstance(clusters, str) or clusters < 1:
        raise UserError(f"num_clusters: {clusters!r} must be a number of at least 1, or auto")
    if config.method == "dmu" and clusters ** (2 * (config.num_experts - 1)) >= 2**63:  # their labels are int64
        raise UserError(f"num_clusters: {clusters} per modality in {config.num_experts - 1} stages is more clusters "
                        "than any data has samples; lower num_clusters or num_experts")
    check_trackers(config.trackers)
    if config.micro_batch_size is not None and config.micro_batch_size < 1:
        raise UserError(f"micro_batch_size: {config.micro_batch_size} must be at least 1, or null")
    if config.top_k > config.num_experts:
        raise UserError(f"top_k: a token cannot go to {config.top_k} of num_experts={config.num_experts} experts")
    check_precision(config.precision, distributed)
    world_size = distributed.world_size
    for name, part in (("mcl", config.mcl), ("router", config.router)):
        if part.batch_size < 2 * world_size or part.batch_size % world_size:
            raise UserError(f"{name}.batch_size: {part.batch_size} must be a multiple of the {world_size} processes, "
                            "with at least 2 samples for each")
        if part.epochs < 1 or (part.max_steps is not None and part.max_steps < 1):
            raise UserError(f"{name}.epochs and {name}.max_steps must be at least 1")
        if part.distillation < 0:
            raise UserError(f"{name}.distillation: {part.distillation} must not be negative")


def check_precision(precision: str, distributed: Distributed) -> None:
    """Raises:
        UserError: there is no such precision, or not on this device.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and distributed.device.type != "cuda":
        raise UserError("precision: fp16 needs a GPU; use fp32 here")
