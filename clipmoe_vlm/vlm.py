"""VLMs of transformers' LLaVA family (Llava, LLaVA-NeXT, VipLlava) and what they must know of their vision tower.

How many tokens a picture has, which processor writes as many, and whether tower, projector and language model fit: said
here once, for users of transformers from 4.36 on and for our programs. transformers builds the tower from its own
configuration alone, so that a tower never sees the VLM around it: these checks run where one of these functions is
called, and nowhere else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, LlavaProcessor, PretrainedConfig, PreTrainedModel

from .convert import load_vision
from .modeling_clipmoe import CLIPMoEVisionModel
from .runs import atomic_folder

FAMILY = ("llava", "llava_next", "vipllava")


# --- what a configuration says -------------------------------------------------------------------------------------


def has_class_token(vision_config: PretrainedConfig) -> bool:
    """Whether the tower's hidden states start with a class token.

    Raises:
        ValueError: a kind of tower that we know nothing of.
    """
    known = {"clip_moe_vision_model": getattr(vision_config, "class_token", None), "clip_vision_model": True,
             "siglip_vision_model": False}
    if vision_config.model_type not in known:
        raise ValueError(f"the vision tower has model_type '{vision_config.model_type}'; supported are "
                         f"{', '.join(known)}")
    return known[vision_config.model_type]


def strategy_for(vision_config: PretrainedConfig, keep_class_token: bool = False) -> str:
    """The `vision_feature_select_strategy` that gives the language model all patches of a tower and nothing else.

    Args:
        keep_class_token: and the class token in front (LLaVA's 'cls_patch').

    Raises:
        ValueError: there is no class token to keep.
    """
    if keep_class_token and not has_class_token(vision_config):
        raise ValueError("the vision tower has no class token to keep; its patches are all its tokens")
    return "default" if has_class_token(vision_config) and not keep_class_token else "full"


def select_strategy(config: PretrainedConfig) -> str:
    """'default' if the VLM drops its tower's first token, else 'full'. VipLlava always drops it."""
    return "default" if config.model_type == "vipllava" else config.vision_feature_select_strategy


def feature_layers(config: PretrainedConfig) -> list[int]:
    """Indices of the hidden states that the projector sees, side by side if there are several."""
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None:
        layers = config.vision_feature_layers  # VipLlava's older name
    return [layers] if isinstance(layers, int) else list(layers)


def tokens_per_picture(config: PretrainedConfig, size: tuple[int, int] | None = None) -> int:
    """Tokens of a picture in the language model.

    Args:
        size: the picture's (height, width) in pixels, on which LLaVA-NeXT's tiles depend; without it only the small
            whole picture in front of them counts.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    tokens = side**2 + has_class_token(vision) - (select_strategy(config) == "default")
    if config.model_type != "llava_next" or size is None:
        return tokens
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    grid = get_anyres_image_grid_shape(list(size), config.image_grid_pinpoints, vision.image_size)
    _, rows, columns = unpad_image(torch.empty(0, grid[0] * side, grid[1] * side), list(size)).shape
    return tokens + rows * (columns + 1)  # image_newline ends each row


def check_config(config: PretrainedConfig) -> None:
    """Raises:
        ValueError: not of the LLaVA family; a hidden state that the tower does not have; a tower without class token
            in a VLM that drops the first token; one with it in a LLaVA-NeXT that keeps it.
    """
    if config.model_type not in FAMILY:
        raise ValueError(f"model_type '{config.model_type}' is no VLM of the LLaVA family; supported are "
                         f"{', '.join(FAMILY)}")
    depth = config.vision_config.num_hidden_layers
    for layer in feature_layers(config):
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"vision_feature_layer {layer} does not exist: the tower's {depth} blocks have the hidden "
                             f"states {-depth - 1}..{depth}")
    if select_strategy(config) == "default" and not has_class_token(config.vision_config):
        patches = tokens_per_picture(config) + 1
        what = ("VipLlava always drops the first token; take Llava, or a tower with a class token"
                if config.model_type == "vipllava" else "vision_feature_select_strategy 'default' drops the first "
                "token; set it to 'full'")
        raise ValueError(f"the vision tower has no class token, so that of its {patches} patches only {patches - 1} "
                         f"would reach the language model: {what}")
    keeps_class_token = select_strategy(config) == "full" and has_class_token(config.vision_config)
    if config.model_type == "llava_next" and keeps_class_token:
        raise ValueError("LLaVA-NeXT puts tiles together patch by patch and has no place for the tower's class token "
                         "(vision_feature_select_strategy must be 'default')")


def check_projector(shape: Sequence[int], config: PretrainedConfig) -> None:
    """Args:
        shape: `[out, in]` of the projector's first linear layer.

    Raises:
        ValueError: it does not fit the tower or the language model (says both numbers).
    """
    vision, text, layers = config.vision_config.hidden_size, config.text_config.hidden_size, len(feature_layers(config))
    if shape[1] != vision * layers:
        several = f" in each of {layers} hidden states, {vision * layers} together" if layers > 1 else ""
        raise ValueError(f"the projector takes features of {shape[1]} channels, but the vision tower has {vision}"
                         f"{several}: take a projector trained on a tower of that width, or a new one")
    if shape[0] != text:
        raise ValueError(f"the projector gives features of {shape[0]} channels, but the language model takes {text}: "
                         "take a projector trained on a language model of that width, or a new one")


# --- the model -----------------------------------------------------------------------------------------------------


def body(model: PreTrainedModel) -> nn.Module:
    """The module that holds `vision_tower`, `multi_modal_projector` and `language_model`.

    The VLM itself in older transformers, its `.model` in newer ones.
    """
    return model if "vision_tower" in dict(model.named_children()) else model.model


def set_tower(model: PreTrainedModel, tower: str | Path | CLIPMoEVisionModel) -> None:
    """Puts another tower, with its weights, in the place of a VLM's own, and makes `model.config` say so.

    Patches stay patches: what the VLM does with a class token is set as the new tower needs it. The processor must be
    made anew (`build_processor`).

    Args:
        tower: the model, or a folder as for `convert.load_vision`.

    Raises:
        FileNotFoundError, ValueError: no such folder, or the tower does not fit (see `check_config`,
            `check_projector`); the model is then as before.
    """
    if not isinstance(tower, nn.Module):
        tower = load_vision(tower)
    parts, config = body(model), copy.deepcopy(model.config)
    changed = {"vision_config": tower.config}
    if config.model_type != "vipllava":
        keeps = select_strategy(config) == "full" and has_class_token(config.vision_config)
        changed["vision_feature_select_strategy"] = strategy_for(tower.config, keeps)
    for name, value in changed.items():
        setattr(config, name, value)
    if hasattr(config, "image_seq_length"):
        changed["image_seq_length"] = tokens_per_picture(config)
    check_config(config)
    first = parts.multi_modal_projector.linear_1.weight
    check_projector(first.shape, config)
    for name, value in changed.items():
        setattr(model.config, name, value)
    parts.vision_tower = tower.to(device=first.device, dtype=first.dtype).train(model.training)


def language_model_linears(model: PreTrainedModel) -> list[str]:
    """Full names of the language model's linear layers but its head: what LoRA adapts (peft's `target_modules`).

    A suffix such as `q_proj` would hit the vision tower, too.
    """
    language_model, head = body(model).language_model, model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is language_model)
    return [f"{prefix}.{name}" for name, module in language_model.named_modules()
            if isinstance(module, nn.Linear) and module is not head]


# --- its processor -------------------------------------------------------------------------------------------------


def build_processor(config: PretrainedConfig, image_processor: Any, tokenizer: Any) -> Any:
    """The `LlavaProcessor` or `LlavaNextProcessor` that goes with a VLM.

    Before transformers 4.45 processors do not know the tower: one `<image>` token is all they write, and the model
    itself makes room for the picture.

    Args:
        image_processor: the tower's (`clipmoe_vlm.processors.image_processor_of`); LLaVA-NeXT's own is made from it.
        tokenizer: the language model's, with `<image>` at `config.image_token_index`.

    Raises:
        ValueError: the parts do not fit each other (see `check_config`, `check_processor`).
    """
    check_config(config)
    processor_class = LlavaProcessor
    if config.model_type == "llava_next":
        processor_class = transformers.LlavaNextProcessor
        if not hasattr(image_processor, "image_grid_pinpoints"):
            names = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "rescale_factor")
            image_processor = transformers.LlavaNextImageProcessor(
                image_grid_pinpoints=config.image_grid_pinpoints,
                **{name: getattr(image_processor, name) for name in names})
    fields = {"patch_size": config.vision_config.patch_size, "vision_feature_select_strategy": select_strategy(config),
              "num_additional_image_tokens": int(has_class_token(config.vision_config))}
    known = inspect.signature(processor_class.__init__).parameters
    processor = processor_class(image_processor=image_processor, tokenizer=tokenizer,
                                **{name: value for name, value in fields.items() if name in known})
    check_processor(config, processor)
    return processor


def check_processor(config: PretrainedConfig, processor: Any) -> None:
    """Raises:
        ValueError: pictures, picture tokens or the id of `<image>` are not those of the model (says both numbers); also
            what `check_config` refuses.
    """
    check_config(config)
    side, pictures = config.vision_config.image_size, processor.image_processor
    size = pictures.crop_size if getattr(pictures, "do_center_crop", False) else pictures.size
    made = [size.get(name) or "?" for name in ("height", "width")]  # "?": as long as the picture is
    if made != [side, side]:
        raise ValueError(f"the processor makes pictures of {made[0]}x{made[1]} pixels, but the tower takes "
                         f"{side}x{side}: {_MAKE_ANEW}")
    if hasattr(processor, "patch_size"):
        tokens, features = _tokens_written(processor, side), tokens_per_picture(config)
        if tokens != features:
            raise ValueError(
                f"the processor writes {tokens} tokens for a picture of which the model makes {features} features "
                f"(patch_size {processor.patch_size}, num_additional_image_tokens "
                f"{getattr(processor, 'num_additional_image_tokens', 1)}, vision_feature_select_strategy "
                f"'{processor.vision_feature_select_strategy}'): {_MAKE_ANEW}")
    if config.model_type == "llava_next":
        ours, theirs = ([list(map(int, pair)) for pair in pairs]
                        for pairs in (config.image_grid_pinpoints, pictures.image_grid_pinpoints))
        if ours != theirs:
            raise ValueError(f"the processor cuts pictures by image_grid_pinpoints {theirs}, the model puts them "
                             f"together by {ours}: {_MAKE_ANEW}")
    token = getattr(processor, "image_token", "<image>")
    token_id = processor.tokenizer.convert_tokens_to_ids(token)
    if token_id != config.image_token_index:
        raise ValueError(f"the tokenizer's id of {token} is {token_id}, but the model's image_token_index is "
                         f"{config.image_token_index}: add the token to the tokenizer and set the index to its id")


_MAKE_ANEW = "make the processor with clipmoe_vlm.vlm.build_processor"


def _tokens_written(processor: Any, side: int) -> int:
    if processor.patch_size is None:
        return 1
    # 4.45 and 4.46, without this field, count a class token always.
    tokens = (side // processor.patch_size) ** 2 + getattr(processor, "num_additional_image_tokens", 1)
    return tokens - (processor.vision_feature_select_strategy == "default")


# --- both on the disk ----------------------------------------------------------------------------------------------


def save_vlm(model: PreTrainedModel, processor: Any, folder: str | Path) -> None:
    """Writes model and processor into a folder that is whole or not there; an older one of that name is replaced.

    Raises:
        ValueError: the processor does not fit the model (see `check_processor`), or the model's tower is not the one
            that its configuration describes, and would not come back.
    """
    check_processor(model.config, processor)
    with torch.device("meta"):
        described = AutoModel.from_config(model.config.vision_config)
    described, found = ({name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
                        for tower in (described, body(model).vision_tower))
    wrong = sorted(name for name in {*described, *found} if described.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"the model's tower is not the one that config.vision_config describes: {wrong[0]} has shape "
                         f"{found.get(wrong[0], 'none')} in the one and {described.get(wrong[0], 'none')} in the "
                         "other; clipmoe_vlm.vlm.set_tower puts a tower into a VLM and keeps both in step")
    with atomic_folder(folder) as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
