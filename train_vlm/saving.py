"""The finished VLM: its weights gathered from all processes, adapters merged, in a folder that reads back."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaNextProcessor, LlavaProcessor

from clipmoe_vlm import vlm
from clipmoe_vlm.runs import UserError, atomic_folder
from train_vlm.chat import ChatEncoder
from train_vlm.model import LLM_TEMPLATE, VLM


def gather_weights(model: VLM, zero_stage: int, is_main: bool) -> dict[str, Tensor]:
    """The whole model's tensors on the main process's CPU, adapters beside their base; every process calls it.

    ZeRO-3's pieces are put together one tensor at a time; 4-bit weights are dequantised.
    """
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gathered = deepspeed.zero.GatheredParameters([parameter]) if zero_stage == 3 else contextlib.nullcontext()
        with gathered:
            if is_main:
                state[name] = _dense(parameter).cpu().clone()
    if is_main:
        buffers = dict(model.named_buffers())
        state |= {name: value.cpu() for name, value in model.state_dict().items()
                  if name not in state and name in buffers}
    return state


def _dense(parameter: nn.Parameter) -> Tensor:
    """A parameter's values; of 4-bit weights those that training computed with."""
    quantized = getattr(parameter, "quant_state", None)
    if quantized is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, quantized)


def merge_adapters(model: VLM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain names; with an adapter `W + scaling * B @ A`, in DoRA each row scaled to the trained magnitude."""
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and f"{name}.base_layer.weight" in state:
            down, up = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
            base = merged[f"{name}.weight"]
            weight = base.float() + module.scaling["default"] * (up.float() @ down.float())
            magnitude = state.get(f"{name}.lora_magnitude_vector.default.weight")
            if magnitude is not None:
                weight *= (magnitude.float() / weight.norm(dim=1))[:, None]
            merged[f"{name}.weight"] = weight.to(base.dtype)
    return merged


def save_vlm(model: VLM, weights: dict[str, Tensor], processor: LlavaProcessor | LlavaNextProcessor,
             folder: Path) -> None:
    """Writes a folder for the model's class and `AutoProcessor`, reads it back and compares.

    Args:
        weights: of `gather_weights`; adapters are merged.

    Raises:
        UserError: what was read back differs from what was trained.
    """
    weights = merge_adapters(model, weights)
    with torch.device("meta"):
        whole = type(model)(model.config)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    whole.load_state_dict(weights, assign=True, strict=False)
    whole.tie_weights()
    whole.generation_config = generation_config(model, processor)
    with atomic_folder(folder) as new:
        vlm.save_vlm(whole, processor, new)
        if processor.tokenizer.chat_template:
            (new / LLM_TEMPLATE).write_text(processor.tokenizer.chat_template, encoding="utf-8")
        loaded, report = type(model).from_pretrained(new, dtype="auto", output_loading_info=True)
        again = loaded.state_dict()
        wrong = sorted([*map(str, report["missing_keys"]), *map(str, report["unexpected_keys"]),
                        *(name for name, value in weights.items() if not torch.equal(again[name], value))])
        if wrong:
            raise UserError(f"the model in {folder} does not read back as it was trained: {', '.join(wrong[:3])}")
        question = [{"from": "human", "value": "<image>\nWhat is this?"}]
        text = AutoProcessor.from_pretrained(new).apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
            add_generation_prompt=True)
        if text != ChatEncoder(processor.tokenizer, processor.chat_template).prompt(question):
            raise UserError(f"the processor in {folder} renders another prompt than training did: {text!r}")


def save_adapter(model: VLM, weights: dict[str, Tensor], base: str, folder: Path) -> None:
    """Writes what `peft.PeftModel.from_pretrained` puts on the VLM folder `base`, where training started.

    Projector and tower are in it as a whole if anything in them trained.
    """
    from peft import get_peft_model_state_dict

    language_model, inner = model.model.language_model, "model.language_model."
    trained = [name for name in ("multi_modal_projector", "vision_tower")
               if any(parameter.requires_grad for parameter in getattr(model.model, name).parameters())]
    own = {name.removeprefix(inner): value for name, value in weights.items() if name.startswith(inner)}
    tensors = {inner + name: value for name, value in
               get_peft_model_state_dict(language_model, own, save_embedding_layers=False).items()}
    whole = tuple(f"model.{name}." for name in trained)
    tensors |= {name: value for name, value in weights.items() if name.startswith(whole)}
    settings = copy.deepcopy(language_model.peft_config["default"])
    settings.target_modules = [inner + name for name in sorted(settings.target_modules)]
    settings.modules_to_save = trained or None
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    with atomic_folder(folder) as new:
        settings.save_pretrained(new)
        save_file({f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()},
                  new / "adapter_model.safetensors", {"format": "pt"})


def generation_config(model: VLM, processor: LlavaProcessor | LlavaNextProcessor) -> Any:
    """The language model's own, which also ends at the special token that ends a turn and never utters `<image>`."""
    tokenizer, generation = processor.tokenizer, model.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    encoder = ChatEncoder(tokenizer, processor.chat_template)
    last = [label for label in encoder.encode(turns)[1] if label >= 0][-1]
    if tokenizer.convert_ids_to_tokens(last) in encoder.control_tokens:
        ends.append(last)
    generation.eos_token_id = sorted({token for token in ends if token is not None})
    generation.use_cache = True
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = [model.config.image_token_id]
    return generation
