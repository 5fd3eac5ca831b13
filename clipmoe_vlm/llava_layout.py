"""LLaVA's checkpoints, and whole VLMs between them and transformers' folders, both ways.

What LLaVA's own loader does with a checkpoint is done here too: projector folders and LoRA folders are put on their
base, the vision tower comes from `mm_vision_tower`, and embeddings behind the tokenizer's last token are cut.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    PretrainedConfig,
)

from .chat_templates import IMAGE_TOKEN, chat_template
from .convert import load_vision
from .processors import image_processor_of
from .runs import atomic_folder, write_json
from .vlm import has_class_token, strategy_for, tokens_per_picture
from .vlm_layout import (
    EMBEDDINGS,
    TOWER,
    VLM,
    WEIGHTS,
    checked,
    classes_of,
    generation_values,
    read_transformers,
    take,
    write_transformers,
)
from .weights import State, local, read_folder, read_json, read_weights

# LLaVA's language models: its model_type (the oldest checkpoints have plain "llava"), the language model's, its class.
LANGUAGE_MODELS = {"llava_llama": ("llama", "LlavaLlamaForCausalLM"), "llava": ("llama", "LlavaLlamaForCausalLM"),
                   "llava_mistral": ("mistral", "LlavaMistralForCausalLM")}
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias", "attention_dropout",
    "sliding_window", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
)
# A tower's folder in a checkpoint, and what `mm_vision_tower` says of one that LLaVA itself cannot read. No path: LLaVA
# without us then ends with "Unknown vision tower: " and this.
TOWER_FOLDER = "vision_tower"
TOWER_BESIDE = f"{TOWER_FOLDER}, a CLIP-MoE in this checkpoint's folder; import clipmoe_vlm.llava before loading it"
# `mm_use_im_patch_token` and `mm_use_im_start_end` of LLaVA's configuration
PATCH_TOKENS, MARK_TOKENS = ("<im_patch>",), ("<im_start>", "<im_end>")


def convert_vlm(source: str | Path, target: str | Path, base: str | Path | None = None,
                tower: str | Path | None = None, template: str | None = None, to: str | None = None,
                say: Callable[[str], None] = print) -> None:
    """The `convert-vlm` command.

    Args:
        source: a checkpoint of LLaVA's (whole, of its stage 1, or of LoRA); with `to="llava"` a VLM of transformers'.
        target: folder to write; must not exist, or be empty.
        base: the language model (or LLaVA) that a stage 1 or LoRA was trained on.
        tower: the vision tower, if it is not where the checkpoint's `mm_vision_tower` says.
        template: `plain`, `v1` or `chat` (see `chat_templates`); default: `plain` for a stage 1, else `v1`.
        to: None or "llava".
        say: is told what is being done, a line per stage.

    Raises:
        FileNotFoundError, ValueError: a part is missing, unsupported or does not fit the others (says which and why).
        UserError: `template` is `chat`, and the tokenizer has none.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists; name a folder that does not, or remove it")
    if to == "llava":
        if base or tower or template:
            raise ValueError("--base, --tower and --template are for reading LLaVA's checkpoints; a VLM of "
                             "transformers' has all of its parts inside")
        write_llava(read_transformers(source, say), target, say)
    else:
        write_transformers(read_llava(source, base, tower, template, say), target, say)


# --- LLaVA's checkpoints -------------------------------------------------------------------------------------------


def read_llava(source: str | Path, base: str | Path | None = None, tower: str | Path | None = None,
               template: str | None = None, say: Callable[[str], None] = print) -> VLM:
    """A checkpoint of LLaVA's in any of its three forms; see `convert_vlm`. All tensors get the language model's dtype,
    as in LLaVA's own loader."""
    source = local(source)
    values = _llava_config(source)
    state, tokenizer_folder = _llava_weights(source, base, say)
    inside = {name: state.pop(name) for name in list(state) if name.startswith(TOWER)}
    vision, tower_state, image_processor = _read_tower(values, source, tower, inside, say)
    dtype = take(state, EMBEDDINGS[0], source).dtype
    state = {name: tensor.to(dtype) for name, tensor in {**state, **tower_state}.items()}

    text_class = CONFIG_MAPPING[LANGUAGE_MODELS[values["model_type"]][0]]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, config=text_class())  # not LLaVA's, which it can't read
    tokens = [*(PATCH_TOKENS if values.get("mm_use_im_patch_token") else ()),
              *(MARK_TOKENS if values.get("mm_use_im_start_end") else ())]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.model_max_length = values.get("tokenizer_model_max_length", tokenizer.model_max_length)
    _fit_vocabulary(state, len(tokenizer), source)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id == len(state[EMBEDDINGS[0]]):
        for name in EMBEDDINGS:
            if name in state:  # never read or uttered: pictures take its place
                state[name] = torch.cat([state[name], state[name].new_zeros(1, state[name].shape[1])])

    kept = {name: values[name] for name in (*TEXT_FIELDS, "rope_theta", "rope_scaling") if values.get(name) is not None}
    text = text_class(**{**kept, "vocab_size": len(state[EMBEDDINGS[0]]), "pad_token_id": tokenizer.pad_token_id})
    tiles = _pinpoints(values)
    config = classes_of("llava_next" if tiles else "llava")[0](
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=image_token_id,
        projector_hidden_act="gelu", vision_feature_layer=int(values["mm_vision_select_layer"]),
        vision_feature_select_strategy=strategy_for(vision, values.get("mm_vision_select_feature") == "cls_patch"),
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=text.tie_word_embeddings,
        **({"image_grid_pinpoints": tiles} if tiles else {}),
    )
    config.image_seq_length = tokens_per_picture(config)
    name = template or ("plain" if values.get("tune_mm_mlp_adapter") else "v1")
    text_of_template = chat_template(name, tokenizer)
    if values.get("mm_use_im_start_end") and name != "plain":  # LLaVA's plain has no marks
        text_of_template = text_of_template.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(MARK_TOKENS))
    pads = values.get("image_aspect_ratio") == "pad"
    return checked(VLM(config, state, tokenizer, tokenizer_folder, image_processor, pads, text_of_template,
                       generation_values(tokenizer_folder)), source)


def _llava_config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{source} is no folder with a config.json: give the output folder of a LLaVA training")
    values = read_json(file)
    if "vision_config" in values:
        raise ValueError(f"{source} is in transformers' layout already (model_type '{values.get('model_type')}'); "
                         "--to llava turns it into LLaVA's")
    if values.get("model_type") not in LANGUAGE_MODELS or not values.get("mm_vision_tower"):
        raise ValueError(f"{source} has model_type '{values.get('model_type')}' and "
                         f"{'a' if values.get('mm_vision_tower') else 'no'} mm_vision_tower; supported are LLaVA's "
                         f"checkpoints with model_type {', '.join(LANGUAGE_MODELS)}")
    projector = values.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(f"{source} has mm_projector_type '{projector}'; transformers' Llava can only carry mlp2x_gelu")
    pictures = (values.get("image_aspect_ratio", "square"), values.get("mm_patch_merge_type", "flat"))
    if pictures not in (("square", "flat"), ("pad", "flat"), ("anyres", "spatial_unpad")):
        raise ValueError(f"{source} has image_aspect_ratio '{pictures[0]}' and mm_patch_merge_type '{pictures[1]}'; "
                         "transformers has 'square' or 'pad' with 'flat', and 'anyres' with 'spatial_unpad'")
    if values.get("s2"):
        raise ValueError(f"{source} has s2: true; transformers' Llava has no place for several scales")
    wanted = ["mm_vision_select_layer", *(["image_grid_pinpoints"] if pictures[0] == "anyres" else [])]
    for name in wanted:
        if values.get(name) is None:
            raise ValueError(f"{file} has no {name}")
    return values


def _pinpoints(values: dict[str, Any]) -> list[list[int]]:
    """The sizes of pictures cut into tiles, `[height, width]`; LLaVA says `[width, height]`. Empty: no tiles."""
    if values.get("image_aspect_ratio") != "anyres":
        return []
    pairs = values["image_grid_pinpoints"]
    return [list(pair[::-1]) for pair in (ast.literal_eval(pairs) if isinstance(pairs, str) else pairs)]


def _llava_weights(source: Path, base: str | Path | None, say: Callable[[str], None]) -> tuple[State, Path]:
    """The tensors of a checkpoint, and the folder that has its tokenizer."""
    adapter = source / "adapter_config.json"
    whole = any((source / f"{name}{end}").is_file() for name in WEIGHTS for end in ("", ".index.json"))
    if whole and not adapter.is_file():
        if base is not None:
            raise ValueError(f"{source} is a whole checkpoint; --base goes with those of stage 1 and LoRA")
        say(f"reading {source}: a whole checkpoint")
        return _plain(read_folder(source, *WEIGHTS)), source
    parts = "adapter" if adapter.is_file() else "projector"
    if parts == "projector" and not (source / "mm_projector.bin").is_file():
        raise FileNotFoundError(f"{source} holds no weights: expected {', '.join(WEIGHTS)}, mm_projector.bin (stage 1) "
                                "or adapter_config.json (LoRA)")
    if base is None:
        trained_on = read_json(source / "config.json").get("_name_or_path") or "?"
        raise ValueError(f"{source} holds a {parts} only: name with --base the language model that it was trained on "
                         f"(its config.json says {trained_on})")
    base = local(base)
    if not base.is_dir():
        raise FileNotFoundError(f"--base {base}: no such folder")
    say(f"reading {source}: {'LoRA' if parts == 'adapter' else 'a projector'} on {base}")
    state = _plain(read_folder(base, *WEIGHTS))
    if parts == "projector":
        return {**state, **_plain(read_weights(source / "mm_projector.bin"))}, base
    if (source / "non_lora_trainables.bin").is_file():
        state |= _plain(read_weights(source / "non_lora_trainables.bin"))
    return _merge_lora(state, source, say), base


def _plain(state: State) -> State:
    """Names without what peft puts before them; without the constants that older transformers saved."""
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if not name.endswith((".inv_freq", ".position_ids"))}


def _merge_lora(state: State, folder: Path, say: Callable[[str], None]) -> State:
    """`W + scaling * B A` (arXiv 2106.09685, section 4.1) for every pair; other tensors replace their namesakes."""
    values = read_json(folder / "adapter_config.json")
    odd = [name for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
           if values.get(name)]
    if values.get("peft_type") != "LORA" or odd or not values.get("r") or "lora_alpha" not in values:
        raise ValueError(f"{folder / 'adapter_config.json'} has peft_type {values.get('peft_type')}, r "
                         f"{values.get('r')}, lora_alpha {values.get('lora_alpha')}"
                         f"{' and ' + ', '.join(odd) if odd else ''}; supported is plain LoRA")
    scaling = values["lora_alpha"] / values["r"] ** (0.5 if values.get("use_rslora") else 1)
    adapter = _plain(read_folder(folder, "adapter_model.safetensors", "adapter_model.bin"))
    adapter = {name.replace(".default.", "."): tensor for name, tensor in adapter.items()}
    pairs = sorted(name[: -len(".lora_A.weight")] for name in adapter if name.endswith(".lora_A.weight"))
    say(f"merging {len(pairs)} LoRA matrices")
    for module in pairs:
        down, up = (take(adapter, f"{module}.lora_{letter}.weight", folder) for letter in "AB")
        weight = take(state, f"{module}.weight", f"the base of {folder}")
        if (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise ValueError(f"{folder} changes {module}.weight by {(up.shape[0], down.shape[1])} numbers, but the "
                             f"base has {tuple(weight.shape)}: it was trained on another one")
        state[f"{module}.weight"] = (weight.float() + scaling * (up.float() @ down.float())).to(weight.dtype)
    rest = {name: tensor for name, tensor in adapter.items() if not name.endswith((".lora_A.weight", ".lora_B.weight"))}
    unknown = sorted(name for name in rest if name not in state)
    if unknown:
        raise ValueError(f"{folder} holds {len(unknown)} tensors that the base has no place for, for example "
                         f"{unknown[0]}")
    return {**state, **rest}


def _read_tower(values: dict[str, Any], source: Path, tower: str | Path | None, inside: State,
                say: Callable[[str], None]) -> tuple[PretrainedConfig, State, CLIPImageProcessor]:
    """Configuration, tensors under LLaVA's names, and image processor of a checkpoint's vision tower.

    As LLaVA does, the tensors are those of the folder `mm_vision_tower`; with `unfreeze_mm_vision_tower` those inside
    the checkpoint, unless the tower's folder is inside it too.

    Raises:
        ValueError: also if both are there and differ by more than rounding to half precision.
    """
    name = TOWER_FOLDER if values["mm_vision_tower"] == TOWER_BESIDE else values["mm_vision_tower"]
    is_own = tower is None and not Path(name).is_absolute() and (source / name).is_dir()
    folder = source / name if is_own else local(name if tower is None else tower)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder" if tower is not None else
                                f"{source} has mm_vision_tower '{name}', which is no folder from here (nor in the "
                                "checkpoint): say with --tower where that tower is")
    say(f"vision tower: {folder}")
    model = load_vision(folder)
    config = model.config
    file = folder / "config.json"
    if file.is_file() and read_json(file).get("model_type") in ("clip", "clip_vision_model"):
        config = CLIPVisionConfig.from_pretrained(folder)  # needs nothing of ours in the result
    state = {TOWER + key: tensor for key, tensor in model.state_dict().items()}
    if inside and not is_own and tower is None:
        if values.get("unfreeze_mm_vision_tower"):
            state = inside
        else:
            wrong = sorted(key for key in {*inside, *state} if key not in inside or key not in state
                           or not _same_but_for_rounding(inside[key], state[key]))
            if wrong:
                raise ValueError(f"the vision tower inside {source} is not the one in its mm_vision_tower {name} "
                                 f"({len(wrong)} tensors differ, for example {wrong[0]}), which is what LLaVA would "
                                 f"load: take that with --tower {name}, or the one inside by setting "
                                 "unfreeze_mm_vision_tower to true in config.json")
    return config, state, image_processor_of(folder, config.image_size)


def _same_but_for_rounding(inside: Tensor, tensor: Tensor) -> bool:
    return any(torch.equal(inside, tensor.to(dtype).to(inside.dtype))
               for dtype in (tensor.dtype, torch.float16, torch.bfloat16))


def _fit_vocabulary(state: State, tokens: int, source: Path) -> None:
    """Cuts embeddings that no token has, as LLaVA's loader does."""
    for name in EMBEDDINGS:
        if name in state and len(state[name]) < tokens:
            raise ValueError(f"{source}: the tokenizer has {tokens} tokens, but {name} only {len(state[name])} rows")
        if name in state:
            state[name] = state[name][:tokens]


def write_llava(vlm: VLM, target: Path, say: Callable[[str], None] = print) -> None:
    """A folder that LLaVA's `load_pretrained_model` reads, with the tower in `vision_tower/`.

    Raises:
        ValueError: LLaVA has no place for a part (says which).
    """
    config, text, vision = vlm.config, vlm.config.text_config, vlm.config.vision_config
    model_type = next((name for name, (theirs, _) in LANGUAGE_MODELS.items() if theirs == text.model_type), None)
    if model_type is None:
        raise ValueError(f"the language model has model_type '{text.model_type}'; LLaVA has a class for "
                         f"{', '.join(sorted({theirs for theirs, _ in LANGUAGE_MODELS.values()}))}")
    heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if getattr(text, "mlp_bias", False) or heads * text.num_attention_heads != text.hidden_size:
        raise ValueError(f"the language model has mlp_bias {getattr(text, 'mlp_bias', False)} and head_dim {heads}; "
                         f"LLaVA's has no such bias, and {text.num_attention_heads} heads of a width of "
                         f"{text.hidden_size} together")
    tower = {name[len(TOWER):]: tensor for name, tensor in vlm.state.items() if name.startswith(TOWER)}
    state = {name: tensor for name, tensor in vlm.state.items() if not name.startswith(TOWER)}
    tokens = _tokens_without_image(vlm)
    for name in EMBEDDINGS:
        state[name] = state[name][:tokens]
    if text.tie_word_embeddings:
        del state["lm_head.weight"]
    vocabulary = vlm.tokenizer.get_vocab()
    values = {
        "architectures": [LANGUAGE_MODELS[model_type][1]], "model_type": model_type,
        "torch_dtype": str(state[EMBEDDINGS[0]].dtype).removeprefix("torch."), "use_cache": True,
        **{name: getattr(text, name) for name in TEXT_FIELDS if hasattr(text, name)},
        **_rope(text), "vocab_size": tokens,
        "mm_vision_tower": TOWER_FOLDER if vision.model_type == "clip_vision_model" else TOWER_BESIDE,
        "mm_hidden_size": vision.hidden_size, "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": ("cls_patch" if has_class_token(vision)
                                     and config.vision_feature_select_strategy == "full" else "patch"),
        **_pictures(vlm),
        "mm_use_im_patch_token": all(token in vocabulary for token in PATCH_TOKENS),
        "mm_use_im_start_end": all(token in vocabulary for token in MARK_TOKENS),
        "tokenizer_padding_side": "right", "tokenizer_model_max_length": vlm.tokenizer.model_max_length,
    }
    say(f"writing {target}")
    with atomic_folder(target) as new:
        write_json(new / "config.json", values)
        write_json(new / "generation_config.json", vlm.generation)
        save_tensors(state, new / WEIGHTS[0])
        _save_llava_tokenizer(vlm, tokens, new)
        (new / TOWER_FOLDER).mkdir()
        write_json(new / TOWER_FOLDER / "config.json", {**vision.to_dict(), "_name_or_path": ""})
        save_tensors(tower, new / TOWER_FOLDER / WEIGHTS[0])
        model = load_vision(new / TOWER_FOLDER)
        if vision.model_type == "siglip_vision_model":  # which LLaVA does not know, and takes for CLIP's
            shutil.rmtree(new / TOWER_FOLDER)
            model.save_pretrained(new / TOWER_FOLDER)
        vlm.image_processor.save_pretrained(new / TOWER_FOLDER)
    if "llava" not in target.name.lower():
        say("rename it: LLaVA takes a folder for a VLM if its name has 'llava' in it (and 'mistral' for a Mistral)")
    if vision.model_type == "clip_vision_model":
        say(f"plain LLaVA looks for the tower from where it is started: start it in {target}, or make mm_vision_tower "
            "in its config.json a full path; under clipmoe_vlm.llava neither is needed")
    else:
        say("LLaVA needs clipmoe_vlm.llava for this tower: python -m clipmoe_vlm.llava MODULE ..., or import it first")


def _pictures(vlm: VLM) -> dict[str, Any]:
    if vlm.config.model_type == "llava_next":
        return {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": [list(pair[::-1]) for pair in vlm.config.image_grid_pinpoints]}
    return {"mm_patch_merge_type": "flat", "image_aspect_ratio": "pad" if vlm.pads else "square"}


def _tokens_without_image(vlm: VLM) -> int:
    """The size of the vocabulary before `<image>` (and a padding token) was added; all of it if others came later."""
    image_token_id = vlm.config.image_token_index
    behind = {token for token, index in vlm.tokenizer.get_vocab().items() if index > image_token_id}
    return len(vlm.state[EMBEDDINGS[0]]) if behind - {vlm.tokenizer.pad_token} else image_token_id


def _rope(text: PretrainedConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as transformers 4.36 reads them; newer ones keep both in `rope_parameters`."""
    values = getattr(text, "rope_parameters", None) or {}
    scaling = values or getattr(text, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "dynamic"):
        raise ValueError(f"the language model's positions are scaled by '{kind}'; LLaVA's transformers knows 'linear' "
                         "and 'dynamic'")
    return {"rope_theta": values.get("rope_theta", getattr(text, "rope_theta", 10000.0)),
            "rope_scaling": None if kind == "default" else {"type": kind, "factor": scaling["factor"]}}


def _save_llava_tokenizer(vlm: VLM, tokens: int, folder: Path) -> None:
    """The tokenizer without `<image>`, in files that transformers 4.36 reads with `use_fast=False`.

    Llama's sentencepiece model if the source has it; else today's tokenizer.json, spelled as tokenizers 0.15 does.
    """
    tokenizer = vlm.tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= tokens:
        special["pad_token"] = tokenizer.unk_token or tokenizer.eos_token
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {str(index): {field: getattr(token, field) for field in fields}
             for index, token in sorted(tokenizer.added_tokens_decoder.items()) if index < tokens}
    values = {**special, "added_tokens_decoder": added, "model_max_length": tokenizer.model_max_length,
              "padding_side": "right", "clean_up_tokenization_spaces": False}
    model = vlm.tokenizer_folder / "tokenizer.model"
    if model.is_file():
        shutil.copyfile(model, folder / model.name)
        values |= {"tokenizer_class": "LlamaTokenizer", "legacy": getattr(tokenizer, "legacy", None) is not False,
                   "add_bos_token": True, "add_eos_token": False}
    else:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < tokens]
        if "merges" in backend["model"]:
            backend["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair)
                                          for pair in backend["model"]["merges"]]
        write_json(folder / "tokenizer.json", backend)
    write_json(folder / "tokenizer_config.json", values)


def save_tensors(state: State, file: Path) -> None:
    # Without this mark transformers refuses the file.
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})
