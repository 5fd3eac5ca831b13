"""A LLaVA in parts, between the two layouts, and transformers' folders of it (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from .chat_templates import IMAGE_TOKEN
from .processors import as_class, image_processor_of
from .runs import atomic_folder
from .vlm import build_processor, check_config, check_projector, save_vlm
from .weights import State, local, read_folder, read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOWER = "model.vision_tower.vision_tower."
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
CLASSES = {"llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
           "llava_next": ("LlavaNextConfig", "LlavaNextForConditionalGeneration")}
# Transformers' names up to 4.51 and since, and LLaVA's.
NAMES = {
    ("vision_tower.", "model.vision_tower."): TOWER,
    ("multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_1."): "model.mm_projector.0.",
    ("multi_modal_projector.linear_2.", "model.multi_modal_projector.linear_2."): "model.mm_projector.2.",
    ("image_newline", "model.image_newline"): "model.image_newline",
    ("language_model.lm_head.", "lm_head."): "lm_head.",
    ("language_model.model.", "model.language_model."): "model.",
}


@dataclasses.dataclass
class VLM:
    """A LLaVA that is read.

    Attributes:
        config: transformers' `LlavaConfig` or `LlavaNextConfig`.
        state: all tensors under LLaVA's names, the tower's as `model.vision_tower.vision_tower.vision_model.*`; the
            embeddings have a row for `<image>`.
        tokenizer: knows `<image>`; its files are in `tokenizer_folder`.
        image_processor: the tower's.
        pads: whether oblong pictures are padded to squares (LLaVA's `image_aspect_ratio: pad`).
        template: the chat template's source.
        generation: values of generation_config.json.
    """

    config: PretrainedConfig
    state: State
    tokenizer: Any
    tokenizer_folder: Path
    image_processor: CLIPImageProcessor
    pads: bool
    template: str | None
    generation: dict[str, Any]


def read_transformers(source: str | Path, say: Callable[[str], None] = print) -> VLM:
    """A VLM of transformers' (`LlavaForConditionalGeneration`); see `convert_vlm`."""
    source = local(source)
    file = source / "config.json"
    values = read_json(file) if file.is_file() else {}
    model_type = values.get("model_type")
    if model_type not in CLASSES or "vision_config" not in values:
        found = f"model_type '{model_type}'" if values else "no config.json"
        raise ValueError(f"{source} has {found}; --to llava takes VLMs of transformers' with model_type "
                         f"{' or '.join(CLASSES)}")
    config = classes_of(model_type)[0].from_pretrained(source)
    act, layer = config.projector_hidden_act, config.vision_feature_layer
    if act != "gelu" or not isinstance(layer, int):
        raise ValueError(f"{source} has projector_hidden_act '{act}' and vision_feature_layer {layer}; LLaVA has a "
                         "place for 'gelu' and one layer")
    say(f"reading {source}")
    state = {_llava_name(name): tensor for name, tensor in read_folder(source, *WEIGHTS).items()
             if not name.endswith((".inv_freq", ".position_ids"))}
    tokenizer = AutoTokenizer.from_pretrained(source)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id != config.image_token_index:
        raise ValueError(f"{source}: image_token_index is {config.image_token_index}, but the tokenizer's id of "
                         f"{IMAGE_TOKEN} is {image_token_id}")
    image_processor = image_processor_of(source, config.vision_config.image_size)
    pads = model_type == "llava" and bool(getattr(image_processor, "do_pad", False))
    return checked(VLM(config, state, tokenizer, source, as_class(image_processor, CLIPImageProcessor), pads,
                        None, generation_values(source)), source)


def write_transformers(vlm: VLM, target: Path, say: Callable[[str], None] = print) -> None:
    """A folder for transformers' model class and `AutoProcessor`; it is read back and compared.

    Raises:
        ValueError: what is read back differs.
    """
    model = _skeleton(vlm.config)
    for name in model.state_dict():
        module, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(module), vlm.state[_llava_name(name)]
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
    model.tie_weights()
    model.generation_config = GenerationConfig(**vlm.generation, suppress_tokens=[vlm.config.image_token_index])
    processor = build_processor(vlm.config, _vlm_processor(vlm.image_processor, vlm.pads, say), vlm.tokenizer)
    if hasattr(processor, "chat_template"):
        processor.chat_template = vlm.template
    else:  # transformers before 4.43
        vlm.tokenizer.chat_template = vlm.template
    say(f"writing {target}")
    with atomic_folder(target) as new:
        save_vlm(model, processor, new)
        sentencepiece = vlm.tokenizer_folder / "tokenizer.model"
        if sentencepiece.is_file():  # LLaVA wants it, should the folder go back
            shutil.copyfile(sentencepiece, new / sentencepiece.name)
        say("reading it back")
        name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        again, report = type(model).from_pretrained(new, output_loading_info=True, **{name: "auto"})
        wrong = sorted([*map(str, report["missing_keys"]), *map(str, report["unexpected_keys"]),
                        *(key for key, tensor in again.state_dict().items()
                          if not torch.equal(tensor, vlm.state[_llava_name(key)]))])
        if wrong:
            raise ValueError(f"what was written to {target} does not read back the same: {', '.join(wrong[:3])}")


def _llava_name(name: str) -> str:
    """A tensor's name in LLaVA, from its name in any transformers, on the disk or in a model."""
    for spellings, theirs in NAMES.items():
        for spelling in spellings:
            if name.startswith(spelling):
                name = name[len(spelling):]
                if theirs == TOWER:  # transformers 5 has CLIP's without its module's name in front
                    name = "vision_model." + name.removeprefix("vision_model.")
                return theirs + name
    return name


def classes_of(model_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Raises ValueError if this transformers does not have them yet."""
    config_class, model_class = (getattr(transformers, name, None) for name in CLASSES[model_type])
    if model_class is None:
        raise ValueError(f"this is a {model_type}, which transformers {transformers.__version__} does not have yet")
    return config_class, model_class


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return classes_of(config.model_type)[1](config)


def checked(vlm: VLM, source: Path) -> VLM:
    """Raises:
        ValueError: tensors are missing, left over, or of another shape than the configuration says.
    """
    config, state = vlm.config, vlm.state
    check_config(config)
    check_projector(take(dict(state), "model.mm_projector.0.weight", source).shape, config)
    if config.text_config.tie_word_embeddings:
        state.setdefault(EMBEDDINGS[1], state[EMBEDDINGS[0]])
    expected = {_llava_name(name): tuple(tensor.shape) for name, tensor in _skeleton(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for what, names in (("lacks", expected.keys() - found.keys()),
                        ("holds what its configuration has no place for,", found.keys() - expected.keys())):
        if names:
            raise ValueError(f"{source} {what} {len(names)} tensors: {', '.join(sorted(names)[:3])}"
                             f"{' ...' if len(names) > 3 else ''}")
    wrong = sorted(name for name in expected if expected[name] != found[name])
    if wrong:
        raise ValueError(f"{source}: {wrong[0]} has shape {found[wrong[0]]}, but its configuration asks for "
                         f"{expected[wrong[0]]}")
    return vlm


# --- parts of both -------------------------------------------------------------------------------------------------


def take(state: State, name: str, source: str | Path) -> Tensor:
    if name not in state:
        raise ValueError(f"{source} has no tensor {name}")
    return state[name]


def generation_values(folder: Path) -> dict[str, Any]:
    """Of generation_config.json; without the sampling values that have no effect, which newer transformers refuses."""
    file = folder / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    idle = () if values.get("do_sample") else ("temperature", "top_p", "top_k", "min_p", "typical_p")
    return {name: value for name, value in values.items()
            if name not in ("_from_model_config", "transformers_version", "suppress_tokens", *idle)}


def _vlm_processor(image_processor: CLIPImageProcessor, pads: bool, say: Callable[[str], None]) -> Any:
    """The tower's image processor with LLaVA's rule for oblong pictures."""
    if not pads:
        return image_processor
    processor_class = getattr(transformers, "LlavaImageProcessor", None)  # since 4.50
    if processor_class is not None:
        return as_class(image_processor, processor_class, do_pad=True)
    image_processor.do_pad = True
    say(f"this checkpoint pads oblong pictures to squares; transformers {transformers.__version__} cuts them instead, "
        "4.50 and newer ones do as the folder says: pad them yourself, or upgrade")
    return image_processor
