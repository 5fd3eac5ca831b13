"""The VLM: tower, projector and language model put together, what of it trains, and its loss.

Shapes: B samples, T tokens (picture tokens included), N pictures, P tokens a picture, D hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
from clipmoe_vlm.tuning import set_tower_trainable
from clipmoe_vlm.vlm import build_processor, check_config, strategy_for
from train_vlm.chat import IGNORE_INDEX
from train_vlm.config import VLMConfig

# A VLM folder's chat template is that of its training; the language model's own is kept beside it for later stages.
LLM_TEMPLATE = "llm_chat_template.jinja"

# --- putting it together -------------------------------------------------------------------------------------------


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


# --- what trains ---------------------------------------------------------------------------------------------------


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


# --- loss ----------------------------------------------------------------------------------------------------------


class LabelLoss(nn.Module):
    """Cross-entropy of the language model's head, at labelled positions only and in chunks.

    A module of its own so that ZeRO-3 gathers the head's weight once for all chunks (it is set as a leaf module).

    Args:
        vocabulary: the first rows of `lm_head` that take part in the softmax (all but an appended `<image>`).
    """

    CHUNK = 1024  # rows whose logits exist at a time

    def __init__(self, lm_head: nn.Linear, vocabulary: int):
        super().__init__()
        self.lm_head = lm_head
        self.vocabulary = vocabulary

    def forward(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """`[L, D]`, `[L]` -> sum of the cross-entropies, float32."""
        weight = self.lm_head.weight[: self.vocabulary]
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.CHUNK, chunking_method=None)
        return F.linear_cross_entropy(
            hidden_states, weight, targets, reduction="sum", options=options if len(targets) > self.CHUNK else None
        ).float()


class VLMLoss(nn.Module):
    """What the engine trains: pixels and tokens to the sum of label losses and the routers' auxiliary loss."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        self.model = model
        image_token_id, rows = model.config.image_token_id, model.config.text_config.vocab_size
        self.label_loss = LabelLoss(model.lm_head, image_token_id if image_token_id == rows - 1 else rows)

    def forward(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor, pictures: int) -> tuple[Tensor, Tensor]:
        """Computes a micro-batch.

        Args:
            input_ids, labels: `[B, T]`, padded on the right (so that causal attention never looks at padding and
                needs no mask); one `<image>` id per picture token.
            pixel_values: `[N, C, H, W]`, in the order of the marks; one dummy if there is no picture.
            pictures: how many of `pixel_values` are real (N or 0).

        Returns:
            sum of the cross-entropies at labelled positions; aux loss of the tower (0 for a dummy).
        """
        model, config = self.model.model, self.model.config
        tower = model.vision_tower(pixel_values, output_hidden_states=config.vision_feature_layer)
        features = tower.hidden_states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        projected = model.multi_modal_projector(features)
        is_picture = input_ids == config.image_token_id
        embeds = model.language_model.get_input_embeddings()(input_ids.masked_fill(is_picture, 0))
        if pictures:
            embeds = embeds.masked_scatter(is_picture.unsqueeze(-1), projected.to(embeds.dtype))
            aux_loss = tower.aux_loss
        else:
            # Zero gradients, not none: every process then reduces the same gradients.
            embeds = embeds + 0 * projected.sum()
            aux_loss = 0 * tower.aux_loss
        hidden_states = model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        labelled = targets != IGNORE_INDEX
        if not labelled.any():  # a dummy sample: its one position, times 0
            return 0 * self.label_loss(hidden_states[:1, 0], input_ids.new_zeros(1)), aux_loss
        return self.label_loss(hidden_states[:, :-1][labelled], targets[labelled]), aux_loss
