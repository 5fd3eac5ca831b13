"""FLOPs of training steps, and how many a device can do in a second.

Counted are the products of matrices that are computed, each time they are: frozen weights have no gradients, gradient
checkpointing runs the language model's blocks twice, blocks behind `select_layer` do not run. A product with a weight
of N numbers takes 2 N FLOPs per token; attention counts in full, as torch's own counter has it, though a causal one
skips half of it. Padding, dummy pictures and DoRA's norms are left out, and so is a tower whose features are cached
before training.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from clipmoe_vlm.encoder import wanted_hidden_states
from clipmoe_vlm.moe import Router, SparseMoE
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm.config import VLMConfig
from train_vlm.model import VLM

ATTENTION_BACKWARD = 2.5  # times the forward: five products where the forward has two, of which one is computed again

# Dense bfloat16 with float32 sums, in 10^12 FLOPs per second, from NVIDIA's data sheets, by the words with which CUDA's
# name of the card starts.
TFLOPS = {("A100",): 312.0, ("H100",): 989.0, ("H100", "PCIe"): 756.0, ("H100", "NVL"): 835.0, ("H200",): 989.0,
          ("H200", "NVL"): 835.0, ("B200",): 2250.0, ("L40S",): 362.0}


class StepFlops:
    """FLOPs of a training step, from its counts.

    Args:
        model: after `tuning.set_trainable`, before the engine takes it.
    """

    def __init__(self, model: VLM, config: VLMConfig):
        parts, text = model.model, model.config.text_config
        forward, weights = _products(parts.language_model)
        self.token = 2 * forward + weights  # the gradient of what goes in takes as much as the forward
        runs = 1 + config.gradient_checkpointing
        if config.gradient_checkpointing:
            self.token += sum(map(_second_forward, parts.language_model.layers))
        channels = text.num_attention_heads * (getattr(text, "head_dim", None)
                                               or text.hidden_size // text.num_attention_heads)
        self.square = (runs + ATTENTION_BACKWARD) * 4 * channels * text.num_hidden_layers
        head = 2 * model.lm_head.in_features * model.lm_head.out_features
        self.label = head * (2 + model.lm_head.weight.requires_grad)
        forward, weights = _products(parts.multi_modal_projector)
        tower = any(parameter.requires_grad for parameter in parts.vision_tower.parameters())
        first = 0 if tower else 2 * parts.multi_modal_projector.linear_1.weight.numel()  # its input needs no gradient
        trains = any(parameter.requires_grad for parameter in parts.multi_modal_projector.parameters())
        self.tile = tokens_per_picture(model.config) * (
            forward + weights + (forward - first if tower or trains else 0))
        if not config.feature_cache:
            self.tile += _tower(parts.vision_tower, config.select_layer)

    def __call__(self, counts: dict[str, Any]) -> float:
        """FLOPs of `counts` (`tokens`, `label_tokens`, `tiles`, `samples`); the samples are taken as equally long.
        """
        squares = counts["tokens"] ** 2 / max(counts["samples"], 1)
        return (self.token * counts["tokens"] + self.square * squares + self.label * counts["label_tokens"]
                + self.tile * counts["tiles"])


def _products(module: nn.Module) -> tuple[float, float]:
    """FLOPs per token of all linear layers inside: of the forward, and of the gradients of the weights that train."""
    forward = weights = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            product, weight = 2 * part.in_features * part.out_features, part.weight
        elif isinstance(part, Router):
            product, weight = 2 * part.weight.numel(), part.weight
        elif isinstance(part, SparseMoE):
            product = 4 * part.top_k * part.experts.fc1_weight[0].numel()
            weight = part.experts.fc1_weight
        elif any(getattr(part, "use_dora", {}).values()) and any(dropout.p for dropout in part.lora_dropout.values()
                                                                 if isinstance(dropout, nn.Dropout)):
            product, weight = 2 * part.in_features * part.out_features, part.base_layer.weight  # after dropout
        else:
            continue
        forward += product
        weights += product * weight.requires_grad
    return forward, weights


def _second_forward(block: nn.Module) -> float:
    """FLOPs per token of a checkpointed block's: it ends before a last linear layer, whose output nothing needs."""
    last = [module for module in block.modules() if isinstance(module, (nn.Linear, SparseMoE))][-1]
    return _products(block)[0] - (_products(last)[0] if isinstance(last, nn.Linear) else 0)


def _tower(tower: nn.Module, select_layer: int) -> float:
    """FLOPs of a picture or tile in the tower."""
    config, vision = tower.config, tower.vision_model
    tokens = config.num_patches + config.class_token
    embedding = vision.embeddings.patch_embedding.weight
    flops = 2 * embedding.numel() * config.num_patches * (1 + embedding.requires_grad)
    backward = embedding.requires_grad  # whether the gradient goes on through the block, to what trains before it
    for layer in vision.encoder.layers[: max(wanted_hidden_states(select_layer, config.num_hidden_layers))]:
        forward, weights = _products(layer)
        attention = 4 * tokens**2 * config.hidden_size
        flops += tokens * (forward + weights) + attention
        trains = backward or any(parameter.requires_grad for parameter in layer.parameters())
        checkpointed = trains and vision.encoder.gradient_checkpointing
        if checkpointed:
            flops += tokens * _second_forward(layer) + attention
        # To its first norm the gradient goes through the whole block, and so it does to the input of a checkpoint.
        if backward or checkpointed or layer.layer_norm1.weight.requires_grad:
            flops += tokens * forward + ATTENTION_BACKWARD * attention
        elif isinstance(layer.mlp, SparseMoE) and layer.mlp.experts.fc1_weight.requires_grad:
            flops += tokens * 2 * layer.mlp.top_k * layer.mlp.experts.fc2_weight[0].numel()
        backward = trains
    return flops


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOPs that a device can do in a second: a known GPU's by its data sheet, else what a product of matrices reaches.

    Args:
        precision: of the run, fp32 or bf16.
    """
    if device.type == "cuda" and precision == "bf16":
        words = tuple(torch.cuda.get_device_name(device).replace("-", " ").removeprefix("NVIDIA ").split())
        for count in (2, 1):
            if words[:count] in TFLOPS:
                return TFLOPS[words[:count]] * 1e12
    return _measured_flops(device, torch.float32 if precision == "fp32" else torch.bfloat16)


def _measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """The best of products of square matrices for about `seconds`."""
    size = 512 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, until = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
