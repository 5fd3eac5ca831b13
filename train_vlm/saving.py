"""The finished VLM: its weights gathered from all processes, adapters merged, in a folder that reads back."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from clipmoe_vlm import vlm
from clipmoe_vlm.runs import UserError, atomic_folder
from train_vlm.chat import ChatEncoder
from train_vlm.model import LLM_TEMPLATE


def gather_weights(model: LlavaForConditionalGeneration, zero_stage: int, is_main: bool) -> dict[str, Tensor]:
    """The whole model's tensors on the main process's CPU, LoRA merged; every process calls it.

    ZeRO-3's pieces are put together one tensor at a time.
    """
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gathered = deepspeed.zero.GatheredParameters([parameter]) if zero_stage == 3 else contextlib.nullcontext()
        with gathered:
            if is_main:
                state[name] = parameter.detach().cpu().clone()
    if is_main:
        state |= {name: buffer.cpu() for name, buffer in model.state_dict().items()
                  if name not in state and name in dict(model.named_buffers())}
    return _merge_lora(model, state)


def _merge_lora(model: LlavaForConditionalGeneration, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`base_layer + scaling * lora_B @ lora_A` under the plain name."""
    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and f"{name}.base_layer.weight" in state:
            down, up = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
            update = module.scaling["default"] * (up.float() @ down.float())
            merged[f"{name}.weight"] = (merged[f"{name}.weight"].float() + update).to(merged[f"{name}.weight"].dtype)
    return merged


def save_vlm(model: LlavaForConditionalGeneration, weights: dict[str, Tensor], processor: LlavaProcessor,
             folder: Path) -> None:
    """Writes a folder for `LlavaForConditionalGeneration` and `AutoProcessor`, reads it back and compares.

    Raises:
        UserError: what was read back differs from what was trained.
    """
    with torch.device("meta"):
        whole = LlavaForConditionalGeneration(model.config)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    whole.load_state_dict(weights, assign=True, strict=False)
    whole.tie_weights()
    whole.generation_config = generation_config(model, processor)
    with atomic_folder(folder) as new:
        vlm.save_vlm(whole, processor, new)
        if processor.tokenizer.chat_template:
            (new / LLM_TEMPLATE).write_text(processor.tokenizer.chat_template, encoding="utf-8")
        loaded, report = LlavaForConditionalGeneration.from_pretrained(new, dtype="auto", output_loading_info=True)
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


def generation_config(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Any:
    """The language model's own, which also ends at the special token that ends a turn and never utters `<image>`."""
    tokenizer, generation = processor.tokenizer, model.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    last = [label for label in ChatEncoder(tokenizer, processor.chat_template).encode(turns)[1] if label >= 0][-1]
    if last in tokenizer.all_special_ids:
        ends.append(last)
    generation.eos_token_id = sorted({token for token in ends if token is not None})
    generation.use_cache = True
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = [model.config.image_token_id]
    return generation
