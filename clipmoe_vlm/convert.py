"""Other people's CLIPs in, our folders out, and the official CLIP-MoE state dict both ways.

`_read` turns any source into a configuration and a state dict with our names; dispatch is on `config.json`'s
`model_type`, on `open_clip_config.json`, or on the names of the tensors in a weights file. OpenAI's tensor names
(also those of open_clip and of the official CLIP-MoE) are translated in `openai_layout.py`.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPTokenizer, CLIPVisionConfig

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoEVisionConfig
from .modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel
from .openai_layout import config_of_official, config_of_open_clip, names_to_official, names_to_ours
from .runs import atomic_folder, atomic_write

SUPPORTED = (
    "supported are CLIP-MoE folders (model_type clip_moe), transformers' CLIPModel folders (clip), open_clip's ViTs "
    "with a class token (a folder with open_clip_config.json, or a weights file and --architecture), and the official "
    "CLIP-MoE state dict (.pt or .safetensors, with --top-k)"
)
CLIP_VOCABULARY = 49408
State = dict[str, Tensor]


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
    return _build(CLIPMoEModel, config, state, source)


def local(source: str | Path) -> Path:
    """The file or folder itself; else the folder of the hub's model of that name, downloaded if need be.

    Raises:
        FileNotFoundError: `source` looks like a hub name, and the hub has no such model or cannot be reached.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{source}: no such file or folder here, and no such model from the hub "
                                f"({str(error).splitlines()[0]})") from error
    return folder


def load_dense(source: str | Path, architecture: str | None = None) -> CLIPMoEModel:
    """A dense CLIP (a base for experts) in float32. See `load_model`.

    Raises:
        ValueError: also if the source is a mixture of experts.
    """
    model = load_model(source, architecture).float()
    if model.config.vision_config.num_experts > 1 or model.config.text_config.num_experts > 1:
        raise ValueError(f"{source} is a CLIP-MoE already; a dense CLIP is needed here")
    return model


def vision_config_of(folder: str | Path) -> CLIPMoEVisionConfig:
    """The vision tower's configuration in a folder, without reading weights. Raises as `load_model`."""
    config = _folder_config(local(folder))
    return config.vision_config if isinstance(config, CLIPMoEConfig) else config


def load_vision(folder: str | Path) -> CLIPMoEVisionModel:
    """The vision tower of a folder, in its own dtype, in evaluation mode. Raises as `load_model`."""
    config, state = _read(local(folder), None, None)
    if isinstance(config, CLIPMoEConfig):
        config = config.vision_config
    state = {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
    return _build(CLIPMoEVisionModel, config, state, folder)


def processors_of(source: str | Path, architecture: str | None = None,
                  config: CLIPMoEConfig | CLIPMoEVisionConfig | None = None) -> tuple[CLIPImageProcessor, Any]:
    """Image processor and tokenizer of a source.

    The tokenizer is that of the folder, else CLIP's BPE (from the open_clip package) when the vocabulary has its 49,408
    entries; None for another vocabulary or for a vision tower alone. Image processor: see `image_processor_of`.

    Args:
        config: the source's configuration; needed for an official state dict, else read from the source.
    """
    source = local(source)
    if config is None:
        config = _folder_config(source) if source.is_dir() else _read(source, architecture, None)[0]
    if not isinstance(config, CLIPMoEConfig):
        return image_processor_of(source, config.image_size), None
    image_processor = image_processor_of(source, config.vision_config.image_size)
    if (source / "tokenizer_config.json").is_file():
        return image_processor, AutoTokenizer.from_pretrained(source)
    if config.text_config.vocab_size == CLIP_VOCABULARY:
        return image_processor, clip_tokenizer(config.text_config.max_position_embeddings)
    return image_processor, None


def image_processor_of(source: str | Path, image_size: int) -> CLIPImageProcessor:
    """The source's own image processor; else as open_clip_config.json says, or as OpenAI's CLIP, at `image_size`.

    Raises:
        ValueError: open_clip_config.json asks for another kind of resizing than CLIP's.
    """
    source = local(source)
    if (source / "preprocessor_config.json").is_file():
        return CLIPImageProcessor.from_pretrained(source)
    file = source / "open_clip_config.json"
    values = _json(file).get("preprocess_cfg", {}) if file.is_file() else {}
    resize_mode, interpolation = values.get("resize_mode", "shortest"), values.get("interpolation", "bicubic")
    resample = {"bicubic": 3, "bilinear": 2}.get(interpolation)  # PIL's numbers
    if resize_mode != "shortest" or resample is None:
        raise ValueError(f"{file}: pictures are resized by mode '{resize_mode}' and interpolation '{interpolation}'; "
                         "supported are mode 'shortest' (then a centre crop) with 'bicubic' or 'bilinear'")
    statistics = {ours: values[theirs] for theirs, ours in (("mean", "image_mean"), ("std", "image_std"))
                  if theirs in values}
    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size},
                              resample=resample, **statistics)


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """CLIP's BPE tokenizer, made from the vocabulary file inside the open_clip package."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise ValueError("CLIP's vocabulary comes with the open_clip package, which is not installed: "
                         "pip install open_clip_torch, or put the tokenizer's files into the source folder") from None
    theirs = SimpleTokenizer()
    vocabulary = sorted(theirs.encoder, key=theirs.encoder.__getitem__)
    # The last two entries are the marks, which open_clip spells in its own way.
    vocabulary[-2:] = ["<|startoftext|>", "<|endoftext|>"]
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    with tempfile.TemporaryDirectory() as folder:
        _write_bpe(Path(folder), {token: index for index, token in enumerate(vocabulary)}, merges)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)


def _write_bpe(folder: Path, vocabulary: dict[str, int], merges: Sequence[Sequence[str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _split_tokenizer_file(folder: Path) -> None:
    """Replaces tokenizer.json by vocab.json and merges.txt, which every transformers since 4.36 reads.

    Today's tokenizer.json does not load in the transformers of LLaVA's users.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        values = _json(file)
        vocabulary = values["model"]["vocab"]
        if all(token["content"] in vocabulary for token in values["added_tokens"]):
            merges = [pair.split() if isinstance(pair, str) else pair for pair in values["model"]["merges"]]
            _write_bpe(folder, vocabulary, merges)
            file.unlink()


def save_folder(model: CLIPMoEModel, folder: str | Path, image_processor: CLIPImageProcessor | None = None,
                tokenizer: Any = None) -> None:
    """Writes a model folder that is whole or not there; an older one of the same name is replaced."""
    with atomic_folder(folder) as new:
        model.save_pretrained(new)
        if image_processor is not None:
            image_processor.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.model_max_length = model.config.text_config.max_position_embeddings
            tokenizer.save_pretrained(new)
            if isinstance(tokenizer, CLIPTokenizer):
                _split_tokenizer_file(new)


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
            to: str | None = None) -> str:
    """The `convert` command: writes `target` and returns what to tell the user."""
    if to == "official":
        model = load_model(source, architecture, top_k)
        if Path(target).is_dir():
            raise ValueError(f"{target} is a folder; --to official writes one file (.pt or .safetensors)")
        save_official(model, target)
        vision = model.config.vision_config
        if vision.num_experts == 1:
            return f"wrote {target}: in the official code, clipmoe.load('{target}')"
        return (f"wrote {target}: in the official code, clipmoe.loadMoE('{target}', num_experts={vision.num_experts}, "
                f"top_k={vision.num_experts_per_tok}, moe_layers={vision.num_hidden_layers - vision.first_moe_layer})")
    _check_target(Path(source), Path(target))
    model = load_model(source, architecture, top_k)
    image_processor, tokenizer = processors_of(source, architecture, model.config)
    save_folder(model, target, image_processor, tokenizer)
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
        config = _folder_config(source)
        if _model_type(source) is None:
            state = _folder_weights(source, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
            return config, names_to_ours(state, source)
        state = _folder_weights(source, "model.safetensors", "pytorch_model.bin")
        # Checkpoints of older transformers hold the constant 0, 1, 2, ... as a buffer.
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
        if not isinstance(config, CLIPMoEConfig) and not any(name.startswith("vision_model.") for name in state):
            # transformers 5 saves a CLIPVisionModel without its module's name in front.
            state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
        return config, state
    state = _weights(source)
    if any(name.startswith("visual.layer1.") for name in state):
        raise ValueError(f"{source} holds a ResNet CLIP; {SUPPORTED}")
    if architecture is not None:
        if top_k is not None:
            raise ValueError("--top-k and --architecture exclude each other: the one is for an official CLIP-MoE state "
                             "dict, the other for a dense open_clip weights file")
        return config_of_open_clip(_architecture(architecture), architecture), names_to_ours(state, source)
    if "positional_embedding_res" not in state:
        found = "a dense CLIP under open_clip's names" if "visual.conv1.weight" in state else (
            f"tensors like {', '.join(sorted(state)[:3])}")
        raise ValueError(f"{source} holds {found}; an open_clip weights file needs --architecture (a name of "
                         f"open_clip's, or a model.json); {SUPPORTED}")
    return config_of_official(state, top_k, source), names_to_ours(state, source)


def _folder_config(folder: Path) -> CLIPMoEConfig | CLIPMoEVisionConfig:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    model_type = _model_type(folder)
    if model_type is None:
        values = _json(folder / "open_clip_config.json")
        return config_of_open_clip(values.get("model_cfg", values), folder)
    if model_type == "clip_moe":
        return CLIPMoEConfig.from_pretrained(folder)
    if model_type == "clip_moe_vision_model":
        return CLIPMoEVisionConfig.from_pretrained(folder)
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
    raise ValueError(f"{folder} has model_type '{model_type}'; {SUPPORTED}")


def _model_type(folder: Path) -> str | None:
    """`config.json`'s model_type; None for an open_clip folder.

    Raises:
        ValueError: neither kind of configuration is there.
    """
    if (folder / "config.json").is_file():
        return str(_json(folder / "config.json").get("model_type"))
    if (folder / "open_clip_config.json").is_file():
        return None
    raise ValueError(f"{folder} has neither config.json nor open_clip_config.json; {SUPPORTED}")


def _tower_values(config: CLIPConfig) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
             "layer_norm_eps", "initializer_range")
    return {name: getattr(config, name) for name in names}


def _vision_values(config: CLIPVisionConfig) -> dict[str, Any]:
    names = ("image_size", "patch_size", "num_channels", "projection_dim")
    return {**_tower_values(config), **{name: getattr(config, name) for name in names}}


def _architecture(architecture: str) -> dict[str, Any]:
    """open_clip's model configuration by its name or from a file."""
    if Path(architecture).is_file():
        values = _json(Path(architecture))
        return values.get("model_cfg", values)
    try:
        import open_clip
    except ImportError:
        raise ValueError(f"--architecture {architecture} is no file, and open_clip's names are known to its package "
                         "alone: pip install open_clip_torch") from None
    values = open_clip.get_model_config(architecture)
    if values is None:
        raise ValueError(f"--architecture {architecture} is neither a file nor a name that open_clip knows "
                         "(open_clip.list_models() lists them)")
    return values


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return values


def _folder_weights(folder: Path, *names: str) -> State:
    for name in names:
        if (folder / name).is_file():
            return _weights(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            state: State = {}
            for shard in sorted(set(_json(index)["weight_map"].values())):
                state.update(_weights(folder / shard))
            return state
    raise FileNotFoundError(f"{folder} holds no weights: expected {' or '.join(names)}")


def _weights(file: Path) -> State:
    """The tensors of a safetensors or torch file; a training checkpoint's `state_dict`; without DDP's `module.`."""
    try:
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                        raise ValueError(f"{file} is a TorchScript archive (as OpenAI publishes them); save its "
                                         "state_dict to a file and convert that with --architecture")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is not a readable weights file ({reason})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict (a mapping of names to tensors); {SUPPORTED}")
    if all(name.startswith("module.") for name in state):
        state = {name[len("module."):]: tensor for name, tensor in state.items()}
    return state


def _build(model_class: type, config: Any, state: State, source: str | Path) -> Any:
    dtypes = {tensor.dtype for tensor in state.values()}
    model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(f"the weights in {source} do not fit the configuration in {len(wrong)} of {len(expected)} "
                         f"tensors, for example {name}: expected {expected.get(name, 'none')}, found "
                         f"{found.get(name, 'none')}")
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    model.load_state_dict(state)
    return model.eval()


def _check_target(source: Path, target: Path) -> None:
    """Refuses to replace anything but an older model folder."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder to write the model to")
    if target.is_dir() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself; name another folder")
    if target.is_dir() and any(target.iterdir()):
        file = target / "config.json"
        if not file.is_file() or _json(file).get("model_type") != CLIPMoEConfig.model_type:
            raise ValueError(f"{target} exists and is no CLIP-MoE folder: it would be replaced; name another folder")


def _describe(name: str, config: Any) -> str:
    text = f"{name}: {config.num_hidden_layers} blocks of width {config.hidden_size}"
    text += f", {config.image_size} px, patch {config.patch_size}" if name == "vision" else (
        f", {config.max_position_embeddings} positions")
    if config.num_experts == 1:
        return text + ", dense"
    return (f"{text}, {config.num_experts} experts (top {config.num_experts_per_tok}) from block "
            f"{config.first_moe_layer} on")
