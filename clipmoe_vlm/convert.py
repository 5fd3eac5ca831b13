"""Other people's CLIPs in, our folders out, and the official CLIP-MoE state dict both ways.

`_read` turns any source into a configuration and a state dict with our names; dispatch is on `config.json`'s
`model_type`, on `open_clip_config.json`, or on the names of the tensors in a weights file. The translations are in the
`*_layout.py` files; `weights.py` reads files, `processors.py` makes image processors and tokenizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

from . import siglip_layout
from .configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from .modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel
from .open_clip_layout import architecture_values, config_of_open_clip
from .openai_layout import config_of_shapes, names_to_official, names_to_ours
from .processors import image_processor_of, resize_processor, save_tokenizer, tokenizer_of
from .runs import atomic_folder, atomic_write
from .upcycling import resize_pictures
from .weights import State, local, read_folder, read_json, read_weights

SUPPORTED = (
    "supported are CLIP-MoE folders (model_type clip_moe), transformers' CLIPModel and SiglipModel folders (clip, "
    "siglip; also SigLIP 2 with a fixed picture size), open_clip's plain ViTs, its own or timm's, with its plain text "
    "transformer (a folder with open_clip_config.json, or a weights file and --architecture), OpenAI's ViTs (.pt), and "
    "the official CLIP-MoE state dict (.pt or .safetensors, with --top-k)"
)


# --- public --------------------------------------------------------------------------------------------------------


def load_model(source: str | Path, architecture: str | None = None, top_k: int | None = None) -> CLIPMoEModel:
    """Any supported source with both towers, in the source's dtype (float32 if that is mixed), in evaluation mode.

    Args:
        source: a folder or a weights file.
        architecture: for an open_clip weights file, the name of its architecture or the path of its model.json.
        top_k: experts per token, for the official state dict, which does not say.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: the source is not supported, or its weights do not fit its configuration.
    """
    config, state = _read(local(source), architecture, top_k)
    if not isinstance(config, CLIPMoEConfig):
        raise ValueError(f"{source} holds a vision tower alone (model_type {_model_type(local(source))}): it serves as "
                         f"a VLM's vision tower, but here a text tower is needed too; {SUPPORTED}")
    return _build(config, state, source)


def load_dense(source: str | Path, architecture: str | None = None) -> CLIPMoEModel:
    """A dense CLIP (a base for experts) in float32. See `load_model`.

    Raises:
        ValueError: also if the source is a mixture of experts.
    """
    model = load_model(source, architecture).float()
    if model.config.vision_config.num_experts > 1 or model.config.text_config.num_experts > 1:
        raise ValueError(f"{source} is a CLIP-MoE already; a dense CLIP is needed here")
    return model


def config_of(source: str | Path, architecture: str | None = None) -> CLIPMoEConfig | CLIPMoEVisionConfig:
    """The configuration of any source; a folder's, or an `architecture` of open_clip's, without reading weights.

    Raises as `load_model`.
    """
    if architecture is not None:
        return config_of_open_clip(architecture_values(architecture), architecture)
    source = local(source)
    return _folder_config(source) if source.is_dir() else _read(source, None, None)[0]


def vision_config_of(folder: str | Path) -> CLIPMoEVisionConfig:
    """The vision tower's configuration in a folder, without reading weights. Raises as `load_model`."""
    config = _folder_config(local(folder))
    return config.vision_config if isinstance(config, CLIPMoEConfig) else config


def load_vision(folder: str | Path) -> CLIPMoEVisionModel:
    """The vision tower of a folder, in its own dtype, in evaluation mode. Raises as `load_model`."""
    config, state = _read(local(folder), None, None)
    if isinstance(config, CLIPMoEConfig):
        config = config.vision_config
    return _build(config, _vision_part(state), folder)


def processors_of(source: str | Path, architecture: str | None = None,
                  config: CLIPMoEConfig | CLIPMoEVisionConfig | None = None) -> tuple[CLIPImageProcessor, Any]:
    """Image processor (see `processors.image_processor_of`) and tokenizer (`processors.tokenizer_of`) of a source.

    No tokenizer, but None, for a vision tower alone and where there is none.

    Args:
        config: the source's configuration; needed for an official state dict, else read from the source.
    """
    source = local(source)
    if config is None:
        config = config_of(source, architecture)
    if not isinstance(config, CLIPMoEConfig):
        return image_processor_of(source, config.image_size), None
    return (image_processor_of(source, config.vision_config.image_size, architecture),
            tokenizer_of(source, config.text_config))


def save_folder(model: CLIPMoEModel | CLIPMoEVisionModel, folder: str | Path,
                image_processor: CLIPImageProcessor | None = None, tokenizer: Any = None) -> None:
    """Writes a model folder that is whole or not there; an older one of the same name is replaced.

    The text tower's `pad_token_id` becomes the tokenizer's: published configurations are wrong there (SigLIP 2's).
    """
    if tokenizer is not None and tokenizer.pad_token_id is not None:
        model.config.text_config.pad_token_id = tokenizer.pad_token_id
    with atomic_folder(folder) as new:
        model.save_pretrained(new)
        if image_processor is not None:
            image_processor.save_pretrained(new)
        if tokenizer is not None:
            save_tokenizer(tokenizer, new, model.config.text_config.max_position_embeddings)


def save_official(model: CLIPMoEModel, file: str | Path) -> None:
    """Writes the official state dict: safetensors if the name ends so, else a torch file.

    Raises:
        ValueError: the official code has no place for a model like this (says why).
    """
    state = names_to_official(model)
    with atomic_write(file, "wb") as stream:
        if Path(file).suffix == ".safetensors":
            stream.write(safetensors.torch.save(state))
        else:
            torch.save(state, stream)


def convert(source: str, target: str, top_k: int | None = None, architecture: str | None = None,
            to: str | None = None, image_size: int | None = None) -> str:
    """The `convert` command: writes `target` and returns what to tell the user.

    A folder with a vision tower alone becomes our vision tower.

    Args:
        image_size: side of the pictures that the new model is for (see `upcycling.resize_pictures`); default: the
            source's.
    """
    if to == "official":
        model = load_model(source, architecture, top_k)
        if image_size is not None:
            model = resize_pictures(model, image_size)
        if Path(target).is_dir():
            raise ValueError(f"{target} is a folder; --to official writes one file (.pt or .safetensors)")
        save_official(model, target)
        vision = model.config.vision_config
        if vision.num_experts == 1:
            return f"wrote {target}: in the official code, clipmoe.load('{target}')"
        return (f"wrote {target}: in the official code, clipmoe.loadMoE('{target}', num_experts={vision.num_experts}, "
                f"top_k={vision.num_experts_per_tok}, moe_layers={vision.num_hidden_layers - vision.first_moe_layer})")
    _check_target(Path(source), Path(target))
    model = _build(*_read(local(source), architecture, top_k), source)
    image_processor, tokenizer = processors_of(source, architecture, model.config)
    if image_size is not None:
        model, image_processor = resize_pictures(model, image_size), resize_processor(image_processor, image_size)
    save_folder(model, target, image_processor, tokenizer)
    if isinstance(model, CLIPMoEVisionModel):
        return f"wrote {target}\n{_describe('vision', model.config)}"
    lines = [f"wrote {target}", _describe("vision", model.config.vision_config),
             _describe("text", model.config.text_config)]
    if tokenizer is None:
        lines.append(f"no tokenizer written: {source} has none, and a vocabulary of "
                     f"{model.config.text_config.vocab_size} is not CLIP's")
    return "\n".join(lines)


# --- reading -------------------------------------------------------------------------------------------------------


def _read(source: Path, architecture: str | None, top_k: int | None
          ) -> tuple[CLIPMoEConfig | CLIPMoEVisionConfig, State]:
    """Configuration and weights, under our names, of any source."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.is_dir():
        if architecture is not None or top_k is not None:
            raise ValueError(f"{source} is a folder, whose configuration file says all: --architecture goes with an "
                             "open_clip weights file, --top-k with an official CLIP-MoE state dict")
        return _read_folder(source)
    state = read_weights(source)
    if any(name.startswith("visual.layer1.") for name in state):
        raise ValueError(f"{source} holds a ResNet CLIP; {SUPPORTED}")
    if architecture is not None:
        if top_k is not None:
            raise ValueError("--top-k and --architecture exclude each other: the one is for an official CLIP-MoE state "
                             "dict, the other for a dense open_clip weights file")
        config = config_of_open_clip(architecture_values(architecture), architecture)
    elif "positional_embedding_res" in state or "input_resolution" in state:  # official CLIP-MoE, OpenAI's archive
        config = config_of_shapes(state, top_k, source)
    else:
        found = "a dense CLIP under open_clip's names" if any(name.startswith("visual.") for name in state) else (
            f"tensors like {', '.join(sorted(state)[:3])}")
        raise ValueError(f"{source} holds {found}; an open_clip weights file needs --architecture (a name of "
                         "open_clip's, or a model.json; a fine-tuned ViT of OpenAI's is one of the names that end in "
                         f"-quickgelu); {SUPPORTED}")
    return config, names_to_ours(state, config, source)


def _read_folder(folder: Path) -> tuple[CLIPMoEConfig | CLIPMoEVisionConfig, State]:
    config, model_type = _folder_config(folder), _model_type(folder)
    if model_type is None:
        state = read_folder(folder, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return config, names_to_ours(state, config, folder)
    state = read_folder(folder, "model.safetensors", "pytorch_model.bin")
    # Checkpoints of older transformers hold the constant 0, 1, 2, ... as a buffer.
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    if not isinstance(config, CLIPMoEConfig):
        if not any(name.startswith("vision_model.") for name in state):
            # transformers 5 saves a CLIPVisionModel without its module's name in front.
            state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
        state = _vision_part(state)
    return config, siglip_layout.names_to_ours(state, folder) if model_type.startswith("siglip") else state


def _vision_part(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}


def _folder_config(folder: Path) -> CLIPMoEConfig | CLIPMoEVisionConfig:
    if folder.is_file():
        raise ValueError(f"{folder} is a file, and a folder with its configuration is needed here: make one with "
                         f"`python -m clipmoe_vlm convert {folder} FOLDER`")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    model_type = _model_type(folder)
    if model_type is None:
        values = read_json(folder / "open_clip_config.json")
        return config_of_open_clip(values.get("model_cfg", values), folder)
    for ours in (CLIPMoEConfig, CLIPMoEVisionConfig):
        if model_type == ours.model_type:
            try:
                return ours.from_pretrained(folder)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if model_type == "clip_vision_model":
        return CLIPMoEVisionConfig(**_vision_values(CLIPVisionConfig.from_pretrained(folder)))
    if model_type == "clip":
        config = CLIPConfig.from_pretrained(folder)
        text = config.text_config
        text_names = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
        return CLIPMoEConfig(
            vision_config=_vision_values(config.vision_config),
            text_config={**_tower_values(text), **{name: getattr(text, name) for name in text_names}},
            projection_dim=config.projection_dim,
            logit_scale_init_value=config.logit_scale_init_value,
        )
    if model_type == "siglip":
        return siglip_layout.config_of_siglip(read_json(folder / "config.json"), folder)
    if model_type == "siglip_vision_model":
        return CLIPMoEVisionConfig(**siglip_layout.vision_values(read_json(folder / "config.json"), folder))
    note = " (SigLIP 2 NaFlex, which takes pictures of any shape)" if model_type.startswith("siglip2") else ""
    raise ValueError(f"{folder} has model_type '{model_type}'{note}; {SUPPORTED}")


def _model_type(folder: Path) -> str | None:
    """`config.json`'s model_type; None for an open_clip folder, where config.json may be timm's, which has no such key.

    Raises:
        ValueError: neither kind of configuration is there.
    """
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "model_type" in values:
        return str(values["model_type"])
    if (folder / "open_clip_config.json").is_file():
        return None
    raise ValueError(f"{folder} has neither a config.json with a model_type nor an open_clip_config.json; {SUPPORTED}")


def _tower_values(config: CLIPConfig) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps",
             "initializer_range")
    return {"activation": config.hidden_act, **{name: getattr(config, name) for name in names}}


def _vision_values(config: CLIPVisionConfig) -> dict[str, Any]:
    names = ("image_size", "patch_size", "num_channels", "projection_dim")
    return {**_tower_values(config), **{name: getattr(config, name) for name in names}}


def _build(config: CLIPMoEConfig | CLIPMoEVisionConfig, state: State, source: str | Path) -> Any:
    dtypes = {tensor.dtype for tensor in state.values()}
    model = (CLIPMoEModel if isinstance(config, CLIPMoEConfig) else CLIPMoEVisionModel)(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(f"the weights in {source} do not fit the configuration in {len(wrong)} of {len(expected)} "
                         f"tensors, for example {name}: expected {expected.get(name, 'none')}, found "
                         f"{found.get(name, 'none')}")
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    # A host that loads itself may build us on the way, with empty tensors and none of its own weights for ours: ours
    # are then put in their place, and marked, or it would initialise them at random.
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            empty = torch.empty_like(parameter, device="cpu")
            model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(empty)
    model.load_state_dict(state)
    for module in model.modules():
        module._is_hf_initialized = True
    return model.eval()


def _check_target(source: Path, target: Path) -> None:
    """Refuses to replace anything but an older model folder."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder to write the model to")
    if target.is_dir() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself; name another folder")
    if target.is_dir() and any(target.iterdir()):
        file = target / "config.json"
        ours = (CLIPMoEConfig.model_type, CLIPMoEVisionConfig.model_type)
        if not file.is_file() or read_json(file).get("model_type") not in ours:
            raise ValueError(f"{target} exists and is no CLIP-MoE folder: it would be replaced; name another folder")


def _describe(name: str, config: Any) -> str:
    text = f"{name}: {config.num_hidden_layers} blocks of width {config.hidden_size}"
    text += f", {config.image_size} px, patch {config.patch_size}" if name == "vision" else (
        f", {config.max_position_embeddings} positions")
    if config.num_experts == 1:
        return text + ", dense"
    return (f"{text}, {config.num_experts} experts (top {config.num_experts_per_tok}) from block "
            f"{config.first_moe_layer} on")
