"""What transformers needs to know of us: our model types in its Auto classes, files for a transformers that does not
have this package (`trust_remote_code=True`), and the routers' auxiliary loss in its `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPTokenizer

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from .modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel, CLIPMoEVisionTransformer
from .moe import routers_train
from .upcycling import is_moe

if TYPE_CHECKING:
    from transformers import Trainer

try:  # transformers 5 has one class per backend; given one alone it would forget CLIP's other
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    IMAGE_PROCESSORS: tuple[type, ...] = (CLIPImageProcessorPil, CLIPImageProcessor)
except ImportError:
    IMAGE_PROCESSORS = (CLIPImageProcessor,)


def register() -> None:
    """Registers configurations, models, CLIP's image processor and CLIP's tokenizer; safe to call again."""
    for config_class in (CLIPMoEConfig, CLIPMoEVisionConfig, CLIPMoETextConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for config_class, model_class in ((CLIPMoEConfig, CLIPMoEModel), (CLIPMoEVisionConfig, CLIPMoEVisionModel)):
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoImageProcessor.register(config_class, *IMAGE_PROCESSORS, exist_ok=True)
        # `save_pretrained` and `push_to_hub` then add our four files, for people without this package.
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModel")
    AutoTokenizer.register(CLIPMoEConfig, CLIPTokenizer, exist_ok=True)


def add_router_aux_loss(trainer: Trainer, coef: float = 0.01) -> None:
    """Makes a `Trainer`, or any class derived from it such as TRL's, train with `coef` times the tower's `aux_loss`.

    VLMs pay no heed to what a tower returns beside its hidden states: without this the auxiliary loss is off. The
    training loss becomes `loss + coef * aux_loss`, with `aux_loss` averaged over the micro-batches and processes of an
    update, each of which weighs the same however many label tokens or pictures it holds. A micro-batch without pictures
    counts as 0; if a tower runs several times in one micro-batch, the mean is taken. All blocks count that the host has
    the tower compute: up to transformers 5.22 LLaVA asks for those behind its selected layer too. The auxiliary loss is
    logged as `aux_loss` beside `loss`. Evaluation and prediction are left as they are.

    Args:
        trainer: with the model as it will train: routers unfrozen, adapters added.

    Raises:
        ValueError: the trainer's model has no tower with experts, no router of it trains, or this was called before.
        RuntimeError (while training): the tower ran, but no gradient can reach its routers.
    """
    if hasattr(trainer.compute_loss, "adds_router_aux_loss"):
        raise ValueError("this trainer adds the routers' auxiliary loss already")
    _check_routers_train(trainer.model)
    compute_loss, log = trainer.compute_loss, trainer.log
    total, micro_batches = 0.0, 0  # of the aux losses since the last log

    @wraps(compute_loss)
    def compute_loss_with_aux(model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                              **kwargs: Any) -> Any:
        nonlocal total, micro_batches
        if not torch.is_grad_enabled():
            return compute_loss(model, inputs, return_outputs, **kwargs)
        with _aux_losses(model) as found:
            loss = compute_loss(model, inputs, return_outputs, **kwargs)
        loss, outputs = loss if return_outputs else (loss, None)
        aux_loss = _mean_aux_loss(found, loss)
        total, micro_batches = total + aux_loss.detach(), micro_batches + 1
        # After compute_loss, which multiplies by the number of processes what the label tokens of all have divided.
        if not _trainer_divides(trainer, kwargs.get("num_items_in_batch")):
            aux_loss = aux_loss / getattr(trainer, "current_gradient_accumulation_steps",
                                          trainer.args.gradient_accumulation_steps)
        loss = loss + coef * aux_loss
        return (loss, outputs) if return_outputs else loss

    @wraps(log)
    def log_with_aux(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        nonlocal total, micro_batches
        if "loss" in logs and micro_batches:
            logs["aux_loss"] = trainer.accelerator.reduce(total / micro_batches, reduction="mean").item()
            total, micro_batches = 0.0, 0
        log(logs, *args, **kwargs)

    compute_loss_with_aux.adds_router_aux_loss = True
    trainer.compute_loss, trainer.log = compute_loss_with_aux, log_with_aux


def _check_routers_train(model: nn.Module) -> None:
    towers = [module for module in model.modules() if isinstance(module, CLIPMoEVisionTransformer)]
    if not towers:
        raise ValueError(f"{type(model).__name__} has no CLIP-MoE vision tower, so there is no auxiliary loss to add")
    if not any(is_moe(tower) for tower in towers):
        raise ValueError("the vision tower is dense (num_experts: 1): it has no routers, so no auxiliary loss to add")
    if not routers_train(model):
        raise ValueError(
            "no router of the vision tower trains, so its auxiliary loss would be zero. Before you make the trainer:\n"
            "    from clipmoe_vlm.tuning import set_tower_trainable\n"
            "    set_tower_trainable(tower, 'routers', model.config.vision_feature_layer)\n"
            "or with peft, so that they are saved with the adapter: LoraConfig(..., modules_to_save=['router'])")


@contextmanager
def _aux_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the aux loss of every call of a vision tower in `model` meanwhile."""
    found: list[Tensor] = []
    # Hooked for each micro-batch, so that none of another forward or of another model can be among them.
    hooks = [module.register_forward_hook(lambda _module, _inputs, output: found.append(output.aux_loss))
             for module in model.modules() if isinstance(module, CLIPMoEVisionTransformer)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _mean_aux_loss(found: list[Tensor], loss: Tensor) -> Tensor:
    """Scalar, on the loss's device."""
    # Some trainers add a forward without gradient, for their metrics.
    trainable = [aux_loss.to(loss.device) for aux_loss in found if aux_loss.requires_grad]
    if found and not trainable:
        raise RuntimeError(
            "the vision tower ran, but no gradient can reach its routers: they were frozen meanwhile, only routers of "
            "blocks behind the selected layer train, or the tower runs under no_grad")
    return torch.stack(trainable).mean() if trainable else loss.new_zeros(())


def _trainer_divides(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Whether `training_step` (or accelerate, up to transformers 4.45) divides the loss by the accumulation steps."""
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if is_scaled is None:
        by_model = getattr(trainer, "model_accepts_loss_kwargs", False) and num_items_in_batch is not None
        is_scaled = by_model or getattr(trainer, "compute_loss_func", None) is not None
    return not is_scaled
