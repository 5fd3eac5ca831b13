"""How LLaVA trains our tower: what of it trains and how fast, and what is added to the loss and to the log."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts, Router, routers_train
from ..tower import CLIPMoEVisionTower
from ..tuning import set_tower_trainable
from . import saving
from .around import around
from .building import is_clip_moe, say, tower_source
from .settings import settings

# Towers that `initialize_vision_tokenizer` has seen.
_prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Towers whose model's forward runs.
_computing: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def initialize_vision_tokenizer(theirs: Callable, model: Any, model_args: Any, tokenizer: Any) -> None:
    """The last thing that LLaVA does to a model before it trains; by now it has frozen what it freezes."""
    theirs(model, model_args, tokenizer)
    tower, source = model.get_vision_tower(), tower_source(model.config)
    if not isinstance(tower, CLIPMoEVisionTower):
        _refuse_other_tower(tower, source)
        return
    if source != tower.vision_tower_name:
        # LLaVA keeps the tower of the checkpoint that it goes on from, and would write down the other name.
        say(f"going on with the checkpoint's tower, {tower.vision_tower_name}; --vision_tower {source} is not read")
        model.config.mm_vision_tower = tower.vision_tower_name
    if around(type(model).forward, forward) is not type(model).forward:
        raise RuntimeError(f"clipmoe_vlm.llava's patch did not take: {type(model).__name__}.forward has been replaced "
                           "since; call clipmoe_vlm.llava.patch() after that")
    _set_trainable(model, tower)
    trainer_class = _llava_trainer()
    trainer_class.create_optimizer = around(trainer_class.create_optimizer, create_optimizer)
    trainer_class.log = around(trainer_class.log, log)
    saving.follow(model, trainer_class)
    _prepared.add(tower)


def _llava_trainer() -> type:
    from llava.train.llava_trainer import LLaVATrainer

    return LLaVATrainer


def _refuse_other_tower(tower: nn.Module, source: str | None) -> None:
    if is_clip_moe(source):
        if tower.vision_tower_name == source:
            raise RuntimeError(f"{source} is a CLIP-MoE, but LLaVA built a {type(tower).__name__} of it: clipmoe_vlm."
                               "llava's patch did not take; import clipmoe_vlm.llava before the model is built")
        raise RuntimeError(f"--vision_tower {source} would not be read: LLaVA goes on with the tower of the checkpoint "
                           f"that it starts from, {tower.vision_tower_name}. Start from a language model and "
                           "--pretrain_mm_mlp_adapter, or put the CLIP-MoE folder into the checkpoint's config.json "
                           "as mm_vision_tower")
    if settings.tower not in (None, "frozen"):
        raise RuntimeError(f"--tower {settings.tower}: the vision tower {tower.vision_tower_name} is no CLIP-MoE "
                           "folder, and LLaVA trains its own by its own rules; python -m clipmoe_vlm convert makes "
                           "such a folder of a CLIP")


def _set_trainable(model: Any, tower: CLIPMoEVisionTower) -> None:
    tuning = settings.tower
    if tuning is None:
        tuning = "full" if any(parameter.requires_grad for parameter in tower.parameters()) else "frozen"
    if tuning != "frozen":
        if all(module is not tower for module in model.modules()):
            raise ValueError(f"--tower {tuning}: under --fsdp LLaVA keeps the vision tower out of the model, so that "
                             "it never trains; use DeepSpeed")
        if tower.dtype != model.dtype:
            # LLaVA has cast the tower to float16, in which small weights and AdamW's updates vanish: read it again.
            device, tower.is_loaded = tower.device, False
            tower.load_model()
            tower.to(device=device, dtype=model.dtype)
    elif settings.tower_learning_rate is not None:
        raise ValueError(f"--tower_learning_rate {settings.tower_learning_rate}, but nothing of the vision tower "
                         "trains: say what, with --tower")
    set_tower_trainable(tower.vision_tower, tuning, tower.selected_layers, settings.tower_last_n)


def train(theirs: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.train`; refuses to train without what is above."""
    model = trainer.model
    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    if tower not in _prepared and (isinstance(tower, CLIPMoEVisionTower) or settings.tower not in (None, "frozen")):
        raise RuntimeError(
            f"clipmoe_vlm.llava has not prepared the vision tower of {type(model).__name__} for training, so that "
            f"--tower and the routers' auxiliary loss would be without effect: give a --vision_tower, and if the "
            "model has an initialize_vision_tokenizer of its own, let it call LLaVA's")
    deepspeed = getattr(trainer.args, "hf_deepspeed_config", None)
    if tower in _prepared and deepspeed is not None and "optimizer" in deepspeed.config:
        if settings.tower_learning_rate is not None:
            raise ValueError("--tower_learning_rate: DeepSpeed's configuration has an optimizer of its own, which has "
                             "one learning rate for all: take its \"optimizer\" and \"scheduler\" out")
        say(_table(model, {}))
    return theirs(trainer, *args, **kwargs)


# --- loss ----------------------------------------------------------------------------------------------------------


def forward(theirs: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The language model's loss, plus `router_aux_loss_coef` times the tower's auxiliary loss while routers train.

    LLaVA puts a black picture beside each sample that has none. It does not count; without any that does, the
    auxiliary loss is taken times zero, so that routers get a zero gradient, as the projector does, and not none.
    """
    tower = model.get_vision_tower()
    if not isinstance(tower, CLIPMoEVisionTower) or tower in _computing:  # a subclass calls the forward of its parent
        return theirs(model, *args, **kwargs)
    arguments = inspect.signature(theirs).bind(model, *args, **kwargs).arguments
    mask = _picture_mask(arguments.get("input_ids"), arguments.get("images"))
    none_counts = mask is not None and not any(mask)
    tower.picture_mask = None if mask is None or none_counts or all(mask) else torch.tensor(mask)
    tower.aux_loss = torch.zeros(())  # this forward may be without pictures
    _computing.add(tower)
    try:
        output = theirs(model, *args, **kwargs)
    finally:
        _computing.discard(tower)
        tower.picture_mask = None
    aux_loss = tower.aux_loss
    if not aux_loss.requires_grad:
        return output
    loss = output[0] if isinstance(output, tuple) else output.loss
    if loss is None or loss.ndim:
        if not model.training:
            return output
        raise RuntimeError("there is no loss to add the routers' auxiliary loss to (label smoothing and LLaVA-NeXT's "
                           "DPO compute it elsewhere): train with --tower frozen")
    if none_counts:
        aux_loss = 0 * aux_loss
    else:
        _logged.add(aux_loss)
    loss = loss + settings.router_aux_loss_coef * aux_loss.to(loss.device)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


def _picture_mask(input_ids: Tensor | None, images: Tensor | list[Tensor] | None) -> list[bool] | None:
    """For each picture that the tower will get, whether a sample shows it.

    Args:
        input_ids: `[B, T]`, with LLaVA's mark for each picture.
        images: one entry for each mark, and one for each sample without: a picture `[3, S, S]`, or its tiles
            `[N, 3, S, S]`.
    """
    from llava.constants import IMAGE_TOKEN_INDEX

    if input_ids is None or images is None:
        return None
    marks = (input_ids == IMAGE_TOKEN_INDEX).sum(1).tolist()
    shown = [count > 0 for count in marks for _ in range(max(count, 1))]
    if len(shown) != len(images):
        return None
    tiles = [1 if image.ndim == 3 else len(image) for image in images]
    return [flag for flag, count in zip(shown, tiles, strict=True) for _ in range(count)]


# --- optimizer -----------------------------------------------------------------------------------------------------


def create_optimizer(theirs: Callable, trainer: Any) -> torch.optim.Optimizer:
    """LLaVA's groups, those of the tower with a learning rate of their own."""
    if trainer.optimizer is not None:
        return theirs(trainer)
    optimizer, model = theirs(trainer), trainer.model
    tower = {id(parameter) for parameter in model.get_vision_tower().parameters()}
    if settings.tower_learning_rate is not None:
        for group in list(optimizer.param_groups):
            parameters = [parameter for parameter in group["params"] if id(parameter) in tower]
            if parameters:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in tower]
                optimizer.add_param_group({**group, "params": parameters, "lr": settings.tower_learning_rate})
    # ZeRO-3 would skip an empty group, and give each group behind it the learning rate of the one before.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if model.get_vision_tower() in _prepared:
        say(_table(model, {id(parameter): group["lr"] for group in optimizer.param_groups
                           for parameter in group["params"]}))
    return optimizer


def _table(model: nn.Module, rates: dict[int, float]) -> str:
    """What trains, at which learning rate (by the parameter's id)."""
    tower = model.get_vision_tower()
    inside = {id(parameter): name for kind, name in ((nn.Module, "rest"), (Experts, "experts"), (Router, "routers"))
              for module in tower.modules() if isinstance(module, kind) for parameter in module.parameters()}
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            part = f"vision tower: {inside[id(parameter)]}"
        elif "lora_" in name:
            part = "LoRA"
        else:
            part = "projector" if "mm_projector" in name else "language model"
        parts.setdefault(part, []).append(parameter)
    lines = ["what trains:", f"{'part':<22} {'parameters':>14} {'trained':>14}  learning rate"]
    for part, parameters in sorted(parts.items()):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        rate = ", ".join(f"{rate:g}" for rate in sorted({rates[id(p)] for p in trained if id(p) in rates}))
        lines.append(f"{part:<22} {_size(parameters):>14,} {_size(trained):>14,}  {rate or '-'}")
    if routers_train(tower):
        lines.append(f"the loss has {settings.router_aux_loss_coef:g} times the routers' auxiliary loss in it")
    return "\n".join(lines)


def _size(parameters: list[Tensor]) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)  # ZeRO-3 keeps no values


# --- log -----------------------------------------------------------------------------------------------------------


class _Sum:
    """Sum and count of the auxiliary losses since the last line of the log."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def add(self, aux_loss: Tensor) -> None:
        value = torch.stack([aux_loss.detach().float(), torch.ones_like(aux_loss, dtype=torch.float32)])
        self.values = value if self.values is None else self.values + value


_logged = _Sum()


def log(theirs: Callable, trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    """Adds `router_aux_loss`, the mean over all pictures' forwards and processes since the last line."""
    if "loss" in logs and routers_train(trainer.model.get_vision_tower()):
        device = trainer.args.device
        mine = torch.zeros(2, device=device) if _logged.values is None else _logged.values.to(device)
        total, count = trainer.accelerator.reduce(mine).tolist()
        _logged.values = None
        if count:
            logs = {**logs, "router_aux_loss": round(total / count, 4)}
    theirs(trainer, logs, *args, **kwargs)
