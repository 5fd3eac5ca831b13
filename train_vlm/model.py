"""The VLM: tower, projector and language model put together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.chat_templates import IMAGE_TOKEN, chat_template
from clipmoe_vlm.convert import image_processor_of, load_vision
from clipmoe_vlm.processors import as_class
from clipmoe_vlm.runs import UserError
from clipmoe_vlm.vlm import build_processor, check_config, strategy_for
from train_vlm.attention import attend_per_sample
from train_vlm.chat import ChatEncoder
from train_vlm.config import VLMConfig

# A VLM folder's chat template is that of its training; the language model's own is kept beside it for later stages.
LLM_TEMPLATE = "llm_chat_template.jinja"

VLM = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration  # the second with image_aspect_ratio: anyres


def model_class(config: LlavaConfig | LlavaNextConfig) -> type[VLM]:
    return (LlavaNextForConditionalGeneration if config.model_type == "llava_next"
            else LlavaForConditionalGeneration)


def build(config: VLMConfig) -> tuple[VLM, LlavaProcessor | LlavaNextProcessor]:
    """Loads or assembles the VLM (float32 or bfloat16 by `config.precision`) and the processor that goes with it.

    Raises:
        UserError: a part is missing or unfit (names it).
    """
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    if config.vlm:
        model, tokenizer, image_processor = _load_vlm(config.vlm, config, dtype)
    else:
        assert config.llm and config.vision_tower  # checked by config.check
        model, tokenizer, image_processor = _assemble(config.llm, config.vision_tower, config, dtype)
    select_features(model.config, config)
    try:
        image_processor = _with_aspect(image_processor, config.image_aspect_ratio, model.config)
        processor = build_processor(model.config, image_processor, tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    processor.chat_template = chat_template(config.template, tokenizer)
    ChatEncoder(tokenizer, processor.chat_template)  # what can't be trained with is told before anything is computed
    if config.packing:
        attend_per_sample(model.model.language_model)
    if config.liger:
        _use_liger(model.model.language_model)
    return model, processor


def _load_vlm(folder: str, config: VLMConfig, dtype: torch.dtype) -> tuple[VLM, PreTrainedTokenizerBase, Any]:
    model_type = _model_type(folder)
    if model_type not in ("llava", "llava_next"):
        raise UserError(f"vlm: {folder} is no VLM folder (its config.json should have model_type 'llava' or "
                        "'llava_next'); give the model folder of a train_vlm run")
    model_config = as_asked(AutoConfig.from_pretrained(folder), config, f"vlm: {folder}")
    if not isinstance(model_config.vision_config, CLIPMoEVisionConfig):
        raise UserError(f"vlm: {folder} has a vision tower of type '{model_config.vision_config.model_type}', not a "
                        "CLIP-MoE; put one into it with clipmoe_vlm.vlm.set_tower and save_vlm, or start from llm and "
                        "vision_tower")
    model, report = model_class(model_config).from_pretrained(
        folder, config=model_config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    if model_type == "llava" and config.image_aspect_ratio == "anyres":
        report["missing_keys"].remove("model.image_newline")  # transformers draws it as LLaVA does
    _refuse_gaps(report, f"vlm: {folder}")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    with_own_template(processor.tokenizer, folder)
    return model, processor.tokenizer, processor.image_processor


def as_asked(own: LlavaConfig | LlavaNextConfig, config: VLMConfig, where: str) -> LlavaConfig | LlavaNextConfig:
    """The configuration of an earlier VLM, made one that cuts pictures into tiles if the run asks for it.

    Raises:
        UserError: it has learned from tiles and the run has none; `where` names it.
    """
    tiles = config.image_aspect_ratio == "anyres"
    if own.model_type == "llava_next" and not tiles:
        raise UserError(f"{where} was trained on pictures and their tiles: set image_aspect_ratio: anyres (it is "
                        f"{config.image_aspect_ratio}), or start from another folder")
    if not tiles or own.model_type == "llava_next" and not config.image_grid_pinpoints:
        return own
    grid = _grid(config.image_grid_pinpoints, own.vision_config.image_size)
    return LlavaNextConfig.from_dict({**own.to_dict(), "model_type": "llava_next", "image_grid_pinpoints": grid})


def new_config(vision: PreTrainedConfig, text: PreTrainedConfig, image_token_id: int,
               config: VLMConfig) -> LlavaConfig | LlavaNextConfig:
    """The configuration of a VLM that is put together from a tower and a language model."""
    fields = {"vision_config": vision, "text_config": text, "image_token_index": image_token_id,
              "projector_hidden_act": "gelu", "tie_word_embeddings": bool(text.tie_word_embeddings)}
    if config.image_aspect_ratio != "anyres":
        return LlavaConfig(**fields)
    return LlavaNextConfig(image_grid_pinpoints=_grid(config.image_grid_pinpoints, vision.image_size), **fields)


def select_features(model_config: LlavaConfig | LlavaNextConfig, config: VLMConfig) -> None:
    """Makes a VLM's configuration say which of its tower's features the run reads.

    Raises:
        UserError: the tower has no such ones.
    """
    model_config.vision_feature_layer = config.select_layer
    try:
        keeps = config.select_feature == "cls_patch"
        model_config.vision_feature_select_strategy = strategy_for(model_config.vision_config, keeps)
        check_config(model_config)
    except ValueError as error:
        raise UserError(f"select_layer: {config.select_layer}, select_feature: {config.select_feature}: "
                        f"{error}") from error


def _grid(pinpoints: list[list[int]] | None, side: int) -> list[list[int]]:
    """`image_grid_pinpoints` (or LLaVA-NeXT's, scaled to the tower's size) in transformers' order, [height, width].

    Raises:
        UserError: tiles of the tower's size don't fill one of them.
    """
    for pair in pinpoints or []:
        if len(pair) != 2 or any(length <= 0 or length % side for length in pair):
            raise UserError(f"image_grid_pinpoints: {pair} is no [width, height] in multiples of {side}, the tower's "
                            "picture size")
    pinpoints = pinpoints or [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side],
                              [side, 3 * side]]
    return [[height, width] for width, height in pinpoints]


def _assemble(llm_source: str, tower_source: str, config: VLMConfig,
              dtype: torch.dtype) -> tuple[VLM, PreTrainedTokenizerBase, Any]:
    llm, tokenizer = _load_language_model(llm_source, dtype)
    tower, image_processor = load_tower(tower_source)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model_config = new_config(tower.config, llm.config, image_token_id, config)
    with torch.device("meta"):
        model = model_class(model_config)(model_config)
    projector = type(model.model.multi_modal_projector)(model.config)  # torch's default initialisation, as LLaVA's
    if model_config.model_type == "llava_next":
        width = llm.config.hidden_size
        model.model.image_newline = nn.Parameter((torch.randn(width) / math.sqrt(width)).to(dtype))  # as LLaVA's
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
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise UserError(f"llm: {source} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    _refuse_gaps(report, f"llm: {source}")
    if not hasattr(llm.config, "vocab_size") or not hasattr(llm.base_model, "embed_tokens"):
        raise UserError(f"llm: {source}: {type(llm).__name__} is not built as LlavaForConditionalGeneration needs it "
                        "(a decoder with embed_tokens and a vocabulary of its own); of a model that also sees take the "
                        "text-only form")
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id >= llm.config.vocab_size:
        # The new rows are never read (pictures take their place) and get no part in the softmax of the loss.
        old = llm.config.vocab_size
        llm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            llm.get_input_embeddings().weight[old:] = 0
            llm.get_output_embeddings().weight[old:] = 0
    return llm, tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A language model's, with the `<image>` token. Raises OSError or ValueError as transformers does."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def with_own_template(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Gives the tokenizer of a VLM folder its language model's own chat template back, or none if it had none."""
    own = Path(folder) / LLM_TEMPLATE
    tokenizer.chat_template = own.read_text(encoding="utf-8") if own.is_file() else None


def _check_same_language_model(llm: nn.Module, model: VLM, source: str) -> None:
    """LLaVA computes `lm_head(language_model(x))`: refuses language models that scale, cap or shift their logits."""
    ids = torch.arange(4).unsqueeze(0)
    with torch.no_grad():
        expected = llm(input_ids=ids).logits
        got = model.lm_head(model.model.language_model(input_ids=ids).last_hidden_state)
    if model.lm_head.bias is not None or not torch.equal(expected, got):
        raise UserError(f"llm: {source}: {type(llm).__name__} does more to its logits than one matrix product; "
                        f"{type(model).__name__} can't carry it")


def load_tower(source: str) -> tuple[CLIPMoEVisionModel, Any]:
    """The vision tower of a CLIP-MoE or of any dense CLIP that the converter reads, and its image processor."""
    try:
        tower = load_vision(source).float()
        return tower, image_processor_of(source, tower.config.image_size)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"vision_tower: {error}") from error


def _with_aspect(image_processor: Any, aspect: str, config: LlavaConfig | LlavaNextConfig) -> Any:
    """The tower's preprocessing on PIL (as LLaVA's, to the bit), with LLaVA's rule for oblong pictures."""
    if aspect == "anyres":
        return as_class(image_processor, LlavaNextImageProcessorPil, image_grid_pinpoints=config.image_grid_pinpoints)
    if aspect == "pad":
        return as_class(image_processor, LlavaImageProcessorPil, do_pad=True)
    return as_class(image_processor, CLIPImageProcessorPil)


def _use_liger(language_model: PreTrainedModel) -> None:
    """Liger's kernels for the layers. Not its cross-entropy: ours already leaves out tokens without a label, which is
    most of them, and goes by chunks."""
    if not torch.cuda.is_available():
        raise UserError("liger: true needs a GPU: Liger's kernels are written in Triton; set liger: false")
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
        from transformers.integrations.liger import apply_liger_kernel
    except ImportError:
        raise UserError("liger: true needs the package liger-kernel: pip install 'clipmoe-vlm[liger]'") from None
    kind = language_model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"liger: Liger has no kernels for a language model of type {kind}; set liger: false")
    apply_liger_kernel(language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


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
