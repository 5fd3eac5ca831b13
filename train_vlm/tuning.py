"""What of the VLM trains: tower, projector and language model, each by one word of the configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from clipmoe_vlm.runs import UserError
from clipmoe_vlm.tuning import set_tower_trainable
from clipmoe_vlm.vlm import language_model_linears
from train_vlm.config import VLMConfig
from train_vlm.model import VLM

ADAPTERS = ("lora", "dora", "qlora")  # the words of llm_tuning that train adapters beside frozen weights


def set_trainable(model: VLM, config: VLMConfig) -> None:
    """Sets `requires_grad` and training mode of every part; adds adapters to the language model.

    What stands behind `select_layer` in the tower (blocks, final norm, pooling) is not computed, so it never trains.

    Raises:
        UserError: the tower has not what should train, or this machine can't do 4-bit weights.
    """
    model.requires_grad_(False)
    model.eval()
    try:
        set_tower_trainable(model.model.vision_tower, config.tower, config.select_layer, config.tower_last_n)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.projector == "train":
        for parameter in parts_of(model)["projector"]:
            parameter.requires_grad_(True)
    language_model = model.model.language_model
    if config.llm_tuning == "full":
        language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    elif config.llm_tuning in ADAPTERS:
        from peft import LoraConfig, inject_adapter_in_model

        linears = [name.removeprefix("model.language_model.") for name in language_model_linears(model)]
        if config.llm_tuning == "qlora":
            quantize(language_model, linears)
        settings = LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout,
                              target_modules=linears, use_dora=config.llm_tuning == "dora")
        inject_adapter_in_model(settings, language_model)
    language_model.train(config.llm_tuning != "frozen")
    if config.gradient_checkpointing:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in language_model.modules():  # transformers checkpoints in training mode only
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # of the block alone: a frozen model's dropout stays off
        if config.tower != "frozen":
            model.model.vision_tower.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False})


def quantize(language_model: PreTrainedModel, linears: list[str]) -> None:
    """Puts the weights of linear layers into 4 bits as QLoRA does: NF4 in blocks of 64, whose scales are in 8 bits.

    Raises:
        UserError: no bitsandbytes, or none of its kernels is for this machine.
    """
    advice = "use llm_tuning: lora, which needs the weights in 16 bits"
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError(f"llm_tuning: qlora needs the package bitsandbytes: pip install bitsandbytes, or {advice}"
                        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in linears:
        linear = language_model.get_submodule(name)
        small = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype,
                           quant_type="nf4", device="meta")
        small.support_avx512bf16_for_cpu = False  # some CPUs would put the weights into an order for inference alone
        try:
            small.weight = Params4bit(linear.weight.data, quant_type="nf4", module=small).to(device)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(f"llm_tuning: qlora: bitsandbytes can't make 4-bit weights on this machine ("
                            f"{str(error).splitlines()[0]}); {advice}") from error
        small.bias = linear.bias
        language_model.set_submodule(name, small)
    language_model.is_loaded_in_4bit = True  # peft asks for it


def parts_of(model: VLM) -> dict[str, list[nn.Parameter]]:
    """The parameters of each part, tied ones once."""
    modules = {"tower": [model.model.vision_tower], "projector": [model.model.multi_modal_projector],
               "llm": [model.model.language_model, model.lm_head]}
    parts = {name: list(dict.fromkeys(p for module in part for p in module.parameters()))
             for name, part in modules.items()}
    if isinstance(model, LlavaNextForConditionalGeneration):
        parts["projector"].append(model.model.image_newline)
    return parts


def parameter_groups(model: VLM, config: VLMConfig) -> list[dict[str, Any]]:
    """AdamW groups `{name, params, lr, weight_decay}`, one per part that trains; with weight decay norms and biases,
    which do not decay, have a second one."""
    rates = {"tower": config.tower_learning_rate, "projector": config.projector_learning_rate, "llm": None}
    groups = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name, part in parts_of(model).items():
        by_decay: dict[float, list[nn.Parameter]] = {}
        for parameter in part:
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and "bias" not in names[parameter]
                by_decay.setdefault(config.weight_decay if decays else 0.0, []).append(parameter)
        rate = config.learning_rate if rates[name] is None else rates[name]
        groups += [{"name": name, "params": params, "lr": rate, "weight_decay": decay}
                   for decay, params in by_decay.items()]
    return groups


def describe(model: VLM, groups: list[dict[str, Any]]) -> str:
    """A table of what trains, at which learning rate; adapters are part of the language model."""
    rates = {group["name"]: f"{group['lr']:g}" for group in groups}
    lines = [f"{'part':<10} {'parameters':>14} {'trained':>14}  learning rate"]
    for name, params in parts_of(model).items():
        trained = sum(count(p) for p in params if p.requires_grad)
        lines.append(f"{name:<10} {sum(map(count, params)):>14,} {trained:>14,}  {rates.get(name, '-')}")
    return "\n".join(lines)


def count(parameter: nn.Parameter) -> int:
    """Its numbers: all of them where ZeRO-3 leaves a process a part, and where 4-bit weights lie two in a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return math.prod(quantized.shape) if quantized else getattr(parameter, "ds_numel", parameter.numel())
