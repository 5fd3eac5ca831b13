"""What of the VLM trains: tower, projector and language model, each by one word of the configuration."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration

from clipmoe_vlm.runs import UserError
from clipmoe_vlm.tuning import set_tower_trainable
from train_vlm.config import VLMConfig


def set_trainable(model: LlavaForConditionalGeneration, config: VLMConfig) -> None:
    """Sets `requires_grad` and training mode of every part; adds LoRA adapters to the language model.

    What stands behind `select_layer` in the tower (blocks, final norm, pooling) is not computed, so it never trains.
    """
    model.requires_grad_(False)
    model.eval()
    try:
        set_tower_trainable(model.model.vision_tower, config.tower, config.select_layer, config.tower_last_n)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.projector == "train":
        model.model.multi_modal_projector.requires_grad_(True)
    language_model = model.model.language_model
    if config.llm_tuning == "full":
        language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    elif config.llm_tuning == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        # Full names inside the language model: a suffix like q_proj would hit the tower too.
        linears = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
        settings = LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
                              target_modules=linears)
        inject_adapter_in_model(settings, language_model)
    language_model.train(config.llm_tuning != "frozen")
    if config.gradient_checkpointing:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        language_model.train()  # transformers checkpoints in training mode only


def parts_of(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    return {"tower": [model.model.vision_tower], "projector": [model.model.multi_modal_projector],
            "llm": [model.model.language_model, model.lm_head]}


def parameter_groups(model: LlavaForConditionalGeneration, config: VLMConfig) -> list[dict[str, Any]]:
    """AdamW groups `{name, params, lr}`, one per part that trains."""
    rates = {"tower": config.tower_learning_rate, "projector": config.projector_learning_rate, "llm": None}
    groups = []
    for name, modules in parts_of(model).items():
        # A dict drops the second mention of tied weights.
        params = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
        if params:
            rate = config.learning_rate if rates[name] is None else rates[name]
            groups.append({"name": name, "params": params, "lr": rate})
    return groups


def describe(model: LlavaForConditionalGeneration, groups: list[dict[str, Any]]) -> str:
    """A table of what trains, at which learning rate."""
    rates = {group["name"]: f"{group['lr']:g}" for group in groups}
    lines = [f"{'part':<10} {'parameters':>14} {'trained':>14}  learning rate"]
    for name, modules in parts_of(model).items():
        params = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        trained = sum(p.numel() for p in params if p.requires_grad)
        lines.append(f"{name:<10} {sum(p.numel() for p in params):>14,} {trained:>14,}  {rates.get(name, '-')}")
    return "\n".join(lines)
