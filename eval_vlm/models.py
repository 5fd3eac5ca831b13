"""Loads the VLMs that can be scored: folders of transformers' Llava family, or their names on the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    VipLlavaForConditionalGeneration,
)

import clipmoe_vlm  # noqa: F401  (registers the CLIP-MoE tower with transformers)
from clipmoe_vlm.runs import UserError
from clipmoe_vlm.vlm import check_processor

MODELS = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration,
          "vipllava": VipLlavaForConditionalGeneration}
TILED = ("llava_next",)  # their towers see a picture in tiles, as many as its shape asks for


def find_folder(model: str) -> Path:
    """The folder of a model; one that is a name on the hub is fetched (once) and its folder in the cache returned.

    Raises:
        UserError: neither a folder nor a name that the hub gives.
    """
    if Path(model).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:  # no network, no such name, not allowed: each has a class of its own there
        raise UserError(f"model {model}: there is no such folder, and the hub does not give a model of that name "
                        f"({str(error).splitlines()[0]}); name a model folder, or check name and network") from error


def precision_on(device: torch.device, precision: str) -> str:
    """fp32, bf16 or fp16: what `auto` is depends on the device."""
    return {"cuda": "bf16"}.get(device.type, "fp32") if precision == "auto" else precision


def load_vlm(folder: str | Path, device: torch.device, precision: str = "auto") -> tuple[Any, Any]:
    """Model (eval mode) and processor of a VLM folder.

    Raises:
        UserError: no folder, another kind of model, weights missing, no chat template, or a processor that does not
            fit the model.
    """
    folder = Path(folder)
    model_class = MODELS[check_vlm_folder(folder)]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision_on(device, precision)]
    try:
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder, backend="pil")  # the pixels of training, to the last bit
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: model or processor cannot be loaded ({str(error).splitlines()[0]}); the folder is "
                        "not whole, make it again") from error
    if info["missing_keys"]:
        raise UserError(f"{folder}: no weights for {sorted(info['missing_keys'])[0]} and "
                        f"{len(info['missing_keys']) - 1} more; the folder is not whole, make it again")
    if not processor.chat_template:
        raise UserError(f"{folder}: the processor has no chat template, so the prompt is unknown; add "
                        "chat_template.jinja")
    try:
        check_processor(model.config, processor)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return model.to(device).eval(), processor


def check_vlm_folder(folder: Path) -> str:
    """The model_type of a VLM folder.

    Raises:
        UserError: `folder` is none that can answer here.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"model {folder}: there is no config.json; name a model folder of train_vlm") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON ({error}); make the folder again") from error
    model_type = config.get("model_type")
    if "mm_vision_tower" in config or "mm_projector_type" in config:
        raise UserError(f"model {folder} is a checkpoint of the original LLaVA; make a folder for transformers of it: "
                        f"python -m clipmoe_vlm convert-vlm {folder} NEW_FOLDER, and name that")
    if model_type not in MODELS:
        raise UserError(f"model {folder} is not a VLM: its model_type is '{model_type}', supported are "
                        f"{', '.join(MODELS)} (train_vlm writes the first two)")
    return model_type
