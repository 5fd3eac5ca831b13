"""The VLM: tower, projector and language model put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from clipmoe_vlm import CLIPMoEVisionModel
from clipmoe_vlm.chat_templates import IMAGE_TOKEN, chat_template
from clipmoe_vlm.convert import image_processor_of, load_vision
from clipmoe_vlm.processors import as_class
from clipmoe_vlm.runs import UserError
from clipmoe_vlm.vlm import build_processor, check_config, strategy_for
from train_vlm.config import VLMConfig

# A VLM folder's chat template is that of its training; the language model's own is kept beside it for later stages.
LLM_TEMPLATE = "llm_chat_template.jinja"


def build(config: VLMConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Loads or assembles the VLM (float32 or bfloat16 by `config.precision`) and the processor that goes with it.

    Raises:
        UserError: a part is missing or unfit (names it).
    """
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    if config.vlm:
        model, tokenizer, image_processor = _load_vlm(config.vlm, dtype)
    else:
        assert config.llm and config.vision_tower  # checked by config.check
        model, tokenizer, image_processor = _assemble(config.llm, config.vision_tower, dtype)
    model.config.vision_feature_layer = config.select_layer
    try:
        keeps = config.select_feature == "cls_patch"
        model.config.vision_feature_select_strategy = strategy_for(model.config.vision_config, keeps)
        check_config(model.config)
    except ValueError as error:
        raise UserError(f"select_layer: {config.select_layer}, select_feature: {config.select_feature}: "
                        f"{error}") from error
    try:
        processor = build_processor(model.config, _with_aspect(image_processor, config.image_aspect_ratio), tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    processor.chat_template = chat_template(config.template, tokenizer)
    return model, processor


def _load_vlm(folder: str, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, Any]:
    if _model_type(folder) != "llava":
        raise UserError(f"vlm: {folder} is no VLM folder (its config.json should have model_type 'llava'); "
                        "give the model folder of a train_vlm run")
    model, report = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    _refuse_gaps(report, f"vlm: {folder}")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    own = Path(folder) / LLM_TEMPLATE
    processor.tokenizer.chat_template = own.read_text(encoding="utf-8") if own.is_file() else None
    return model, processor.tokenizer, processor.image_processor


def _assemble(llm_source: str, tower_source: str,
              dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase, Any]:
    llm, tokenizer = _load_language_model(llm_source, dtype)
    tower, image_processor = load_tower(tower_source)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        vision_config=tower.config, text_config=llm.config, image_token_index=image_token_id,
        projector_hidden_act="gelu", tie_word_embeddings=bool(llm.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    projector = type(model.model.multi_modal_projector)(config)  # torch's default initialisation, as LLaVA's
    model.model.vision_tower = tower.to(dtype)
    model.model.multi_modal_projector = projector.to(dtype)
    model.model.language_model = llm.base_model
    model.lm_head = llm.get_output_embeddings()
    model.generation_config = llm.generation_config
    _check_same_language_model(llm, model, llm_source)
    return model, tokenizer, image_processor


def _load_language_model(source: str, dtype: torch.dtype) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model (a folder's or the hub's) with room for the `<image>` token, and its tokenizer."""
    try:
        llm, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"llm: {source} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    _refuse_gaps(report, f"llm: {source}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id >= llm.config.vocab_size:
        # The new rows are never read (pictures take their place) and get no part in the softmax of the loss.
        old = llm.config.vocab_size
        llm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            llm.get_input_embeddings().weight[old:] = 0
            llm.get_output_embeddings().weight[old:] = 0
    return llm, tokenizer


def _check_same_language_model(llm: nn.Module, model: LlavaForConditionalGeneration, source: str) -> None:
    """LLaVA computes `lm_head(language_model(x))`: refuses language models that scale, cap or shift their logits."""
    ids = torch.arange(4).unsqueeze(0)
    with torch.no_grad():
        expected = llm(input_ids=ids).logits
        got = model.lm_head(model.model.language_model(input_ids=ids).last_hidden_state)
    if model.lm_head.bias is not None or not torch.equal(expected, got):
        raise UserError(f"llm: {source}: {type(llm).__name__} does more to its logits than one matrix product; "
                        "LlavaForConditionalGeneration can't carry it")


def load_tower(source: str) -> tuple[CLIPMoEVisionModel, Any]:
    """The vision tower of a CLIP-MoE or of any dense CLIP that the converter reads, and its image processor."""
    try:
        tower = load_vision(source).float()
        return tower, image_processor_of(source, tower.config.image_size)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"vision_tower: {error}") from error


def _with_aspect(image_processor: Any, aspect: str) -> Any:
    """The tower's preprocessing on PIL (as LLaVA's, to the bit), with LLaVA's rule for oblong pictures."""
    if aspect == "pad":
        return as_class(image_processor, LlavaImageProcessorPil, do_pad=True)
    return as_class(image_processor, CLIPImageProcessorPil)


def _model_type(source: str) -> str | None:
    file = Path(source) / "config.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error


def _refuse_gaps(report: dict[str, Any], where: str) -> None:
    """transformers fills what a checkpoint lacks with random numbers and only warns."""
    gaps = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in report[name])
    if gaps:
        raise UserError(f"{where} lacks {len(gaps)} of the model's tensors or has them in other shapes: "
                        f"{', '.join(gaps[:3])}{' ...' if len(gaps) > 3 else ''}")
