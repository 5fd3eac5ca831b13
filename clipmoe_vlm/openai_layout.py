"""Tensor names of OpenAI's CLIP, which open_clip and the official CLIP-MoE kept, against ours.

The official CLIP-MoE adds, per MoE block, `experts.e.{c_fc,c_proj}` and `gate.weight`, and has two tables of text
positions (Long-CLIP's): rows 0-19 are read from `positional_embedding`, the others from `positional_embedding_res`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configuration_clipmoe import CLIPMoEConfig
from .modeling_clipmoe import CLIPMoEModel

State = dict[str, Tensor]

KEPT_POSITIONS = 20
OFFICIAL_POSITIONS = 248
# As in OpenAI's models on the hub: the end mark 2 stands for the rule that a text's feature is that of its largest id.
TEXT_MARKS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
# Theirs, ours; the two projections are stored transposed.
PLAIN = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ("logit_scale", "logit_scale"),
)
TRANSPOSED = (("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"))
BLOCKS = (("visual.transformer.resblocks.", "vision_model.encoder.layers."),
          ("transformer.resblocks.", "text_model.encoder.layers."))
IN_BLOCK = (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn.out_proj", "self_attn.out_proj"))
LINEARS = (("c_fc", "fc1"), ("c_proj", "fc2"))
KINDS = ("weight", "bias")
# What open_clip's configurations may say about a plain ViT and a plain text transformer.
VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
               "output_tokens"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id",
             "output_tokens"}
ONLY_VITS = "supported are open_clip's own ViTs with a class token, with its plain text transformer"


def names_to_ours(state: State, source: str | Path) -> State:
    """A state dict under OpenAI's names -> the same weights under ours.

    Raises:
        ValueError: a tensor is missing, or one is left over.
    """
    # open_clip's CustomTextCLIP is the same model with its text tower in a module of its own.
    prefix = "text." if "text.token_embedding.weight" in state else ""
    rest = {name[len(prefix):] if name.startswith(prefix) else name: tensor for name, tensor in state.items()}
    for constant in ("input_resolution", "context_length", "vocab_size"):
        rest.pop(constant, None)

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ValueError(f"{source} has no tensor {name}, which every CLIP ViT with a class token has")
        return rest.pop(name)

    ours = {our_name: take(their_name) for their_name, our_name in PLAIN}
    ours.update({our_name: take(their_name).T.contiguous() for their_name, our_name in TRANSPOSED})
    ours["logit_scale"] = ours["logit_scale"].reshape(())
    if "positional_embedding_res" in rest:
        positions = "text_model.embeddings.position_embedding.weight"
        later_rows = take("positional_embedding_res")[KEPT_POSITIONS:]
        ours[positions] = torch.cat([ours[positions][:KEPT_POSITIONS], later_rows])
    for their_prefix, our_prefix in BLOCKS:
        for block in range(_depth(rest, their_prefix)):
            theirs, mine = f"{their_prefix}{block}.", f"{our_prefix}{block}."
            for their_name, our_name in IN_BLOCK:
                for kind in KINDS:
                    ours[f"{mine}{our_name}.{kind}"] = take(f"{theirs}{their_name}.{kind}")
            for kind in KINDS:
                parts = take(f"{theirs}attn.in_proj_{kind}").chunk(3)
                for name, part in zip("qkv", parts, strict=True):
                    ours[f"{mine}self_attn.{name}_proj.{kind}"] = part.clone()
            experts = _experts(rest, theirs)
            for their_name, our_name in LINEARS:
                for kind in KINDS:
                    if experts:
                        ours[f"{mine}mlp.experts.{our_name}_{kind}"] = torch.stack(
                            [take(f"{theirs}experts.{expert}.{their_name}.{kind}") for expert in range(experts)])
                    else:
                        ours[f"{mine}mlp.{our_name}.{kind}"] = take(f"{theirs}mlp.{their_name}.{kind}")
            if experts:
                ours[f"{mine}mlp.router.weight"] = take(f"{theirs}gate.weight")
    if rest:
        raise ValueError(f"{source} holds {len(rest)} tensors that a CLIP ViT with a class token does not have, for "
                         f"example {min(rest)}")
    return ours


def names_to_official(model: CLIPMoEModel) -> State:
    """Our model -> the official state dict. Both position tables are written in full (each is read in part).

    Raises:
        ValueError: the official code fixes something that this model has otherwise.
    """
    _check_official(model.config)
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    official = {their_name: ours[our_name] for their_name, our_name in PLAIN}
    official.update({their_name: ours[our_name].T for their_name, our_name in TRANSPOSED})
    official["positional_embedding_res"] = official["positional_embedding"].clone()
    for (their_prefix, our_prefix), config in zip(BLOCKS, (model.config.vision_config, model.config.text_config),
                                                  strict=True):
        for block in range(config.num_hidden_layers):
            theirs, mine = f"{their_prefix}{block}.", f"{our_prefix}{block}."
            for kind in KINDS:
                for their_name, our_name in IN_BLOCK:
                    official[f"{theirs}{their_name}.{kind}"] = ours[f"{mine}{our_name}.{kind}"]
                official[f"{theirs}attn.in_proj_{kind}"] = torch.cat(
                    [ours[f"{mine}self_attn.{name}_proj.{kind}"] for name in "qkv"])
                for their_name, our_name in LINEARS:
                    if config.is_moe_layer(block):
                        stacked = ours[f"{mine}mlp.experts.{our_name}_{kind}"]
                        for expert, tensor in enumerate(stacked):
                            official[f"{theirs}experts.{expert}.{their_name}.{kind}"] = tensor.clone()
                    else:
                        official[f"{theirs}mlp.{their_name}.{kind}"] = ours[f"{mine}mlp.{our_name}.{kind}"]
            if config.is_moe_layer(block):
                official[f"{theirs}gate.weight"] = ours[f"{mine}mlp.router.weight"]
    return {name: tensor.contiguous() for name, tensor in official.items()}


def config_of_official(state: State, top_k: int | None, source: str | Path) -> CLIPMoEConfig:
    """What the shapes of an official state dict say; heads are 64 wide, the activation is QuickGELU.

    Raises:
        ValueError: `top_k` is missing or out of range, or given for a dense model.
    """
    for name in ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight"):
        if name not in state:
            raise ValueError(f"{source} has no tensor {name}, which an official CLIP-MoE state dict has")
    towers = [_official_tower(state, their_prefix, top_k, source) for their_prefix, _ in BLOCKS]
    vision, text = towers
    if top_k is not None and vision["num_experts"] == text["num_experts"] == 1:
        raise ValueError(f"{source} has no experts, so --top-k does not apply")
    patch_size = state["visual.conv1.weight"].shape[-1]
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return CLIPMoEConfig(
        vision_config={**vision, "patch_size": patch_size, "image_size": grid * patch_size},
        text_config={**text, **TEXT_MARKS, "vocab_size": state["token_embedding.weight"].shape[0],
                     "max_position_embeddings": state["positional_embedding_res"].shape[0]},
        projection_dim=state["visual.proj"].shape[1],
    )


def _official_tower(state: State, prefix: str, top_k: int | None, source: str | Path) -> dict[str, Any]:
    depth = _depth(state, prefix)
    if depth == 0:
        raise ValueError(f"{source} has no blocks {prefix}*, which an official CLIP-MoE state dict has")
    experts = [_experts(state, f"{prefix}{block}.") for block in range(depth)]
    # The last block is a mixture if any is: the official code counts its MoE layers from the end.
    num_experts = experts[-1] or 1
    if num_experts > 1 and (top_k is None or not 1 <= top_k <= num_experts):
        raise ValueError(f"{source} is an official CLIP-MoE of {num_experts} experts, and it does not say how many of "
                         f"them a token uses: give --top-k 1..{num_experts} (the published model uses 2)")
    fc1 = f"{prefix}{depth - 1}." + ("experts.0." if experts[-1] else "mlp.") + "c_fc.weight"
    if fc1 not in state:
        raise ValueError(f"{source} has no tensor {fc1}, which an official CLIP-MoE state dict has")
    intermediate_size, width = state[fc1].shape
    return {
        "hidden_size": width, "intermediate_size": intermediate_size, "num_hidden_layers": depth,
        "num_attention_heads": width // 64, "hidden_act": "quick_gelu", "num_experts": num_experts,
        "num_experts_per_tok": top_k if num_experts > 1 else 1, "first_moe_layer": experts.count(0) % depth,
    }


def config_of_open_clip(values: dict[str, Any], source: str | Path) -> CLIPMoEConfig:
    """open_clip's model configuration (`embed_dim`, `vision_cfg`, `text_cfg`) -> ours.

    Raises:
        ValueError: anything in it that changes the architecture beyond CLIP's ViT with a class token.
    """
    if not isinstance(values.get("vision_cfg"), dict) or not isinstance(values.get("text_cfg"), dict):
        raise ValueError(f"{source} is no open_clip model configuration: it lacks vision_cfg or text_cfg")
    vision, text = values["vision_cfg"], values["text_cfg"]
    if vision.get("timm_model_name"):
        raise ValueError(f"{source} has the timm vision tower '{vision['timm_model_name']}'; {ONLY_VITS}")
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"{source} has a ResNet for its vision tower (layers {vision['layers']}); {ONLY_VITS}")
    if text.get("hf_model_name"):
        raise ValueError(f"{source} has the transformers text tower '{text['hf_model_name']}'; {ONLY_VITS}")
    _refuse_others(vision, VISION_KEYS, {"pool_type": "tok", "pos_embed_type": "learnable"}, f"{source}: vision_cfg")
    _refuse_others(text, TEXT_KEYS, {"pool_type": "argmax", "proj_type": "linear"}, f"{source}: text_cfg")
    activation = "quick_gelu" if values.get("quick_gelu") else "gelu"
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    text_width = text.get("width", 512)
    return CLIPMoEConfig(
        vision_config={
            "hidden_size": width, "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12), "num_attention_heads": width // head_width,
            "hidden_act": activation, "image_size": _square(vision.get("image_size", 224), source),
            "patch_size": _square(vision.get("patch_size", 16), source),
        },
        text_config={
            "hidden_size": text_width, "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12), "num_attention_heads": text.get("heads", 8),
            "hidden_act": activation, "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77), **TEXT_MARKS,
        },
        projection_dim=values["embed_dim"],
    )


def _refuse_others(values: dict[str, Any], known: set[str], defaults: dict[str, Any], where: str) -> None:
    """Any key that is neither known nor switched off nor at its default would change the architecture."""
    for key, value in values.items():
        if key not in known and value and value != defaults.get(key):
            raise ValueError(f"{where} has {key} = {value!r}; {ONLY_VITS}")


def _square(size: int | list[int], source: str | Path) -> int:
    sizes = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sizes) != 1:
        raise ValueError(f"{source}: pictures and patches must be square, found {size}")
    return sizes.pop()


def _depth(state: State, prefix: str) -> int:
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def _experts(state: State, prefix: str) -> int:
    start = f"{prefix}experts."
    return len({name[len(start):].split(".")[0] for name in state if name.startswith(start)})


def _check_official(config: CLIPMoEConfig) -> None:
    vision, text = config.vision_config, config.text_config
    for name, tower in (("vision", vision), ("text", text)):
        fixed = (
            ("hidden_act", tower.hidden_act, "quick_gelu"),
            ("layer_norm_eps", tower.layer_norm_eps, 1e-5),
            ("num_attention_heads", tower.num_attention_heads, tower.hidden_size // 64),
            ("intermediate_size", tower.intermediate_size, 4 * tower.hidden_size),
        )
        for key, found, expected in fixed:
            if found != expected:
                raise ValueError(f"the official code fixes {key} of the {name} tower at {expected}, this model has "
                                 f"{found}")
    if text.max_position_embeddings != OFFICIAL_POSITIONS:
        raise ValueError(f"the official code has {OFFICIAL_POSITIONS} text positions, this model has "
                         f"{text.max_position_embeddings}; stretch them first (clipmoe_vlm.upcycling."
                         "stretch_text_positions)")
    if (vision.num_experts, vision.num_experts_per_tok) != (text.num_experts, text.num_experts_per_tok):
        raise ValueError("the official code gives both towers the same number of experts and top_k, this model has "
                         f"{vision.num_experts} (top {vision.num_experts_per_tok}) for pictures and {text.num_experts} "
                         f"(top {text.num_experts_per_tok}) for text")
    moe_layers = vision.num_hidden_layers - vision.first_moe_layer
    expected = max(0, text.num_hidden_layers - moe_layers)
    if vision.num_experts > 1 and text.first_moe_layer != expected:
        raise ValueError("the official code has the same number of MoE layers, counted from the end, in both towers: "
                         f"with {moe_layers} for pictures the text tower's must start at block {expected}, not at "
                         f"{text.first_moe_layer}")
