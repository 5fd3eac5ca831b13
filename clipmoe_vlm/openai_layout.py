"""Tensor names of OpenAI's CLIP, which open_clip and the official CLIP-MoE kept, against ours.

The official CLIP-MoE adds, per MoE block, `experts.e.{c_fc,c_proj}` and `gate.weight`, and has two tables of text
positions (Long-CLIP's): rows 0-19 are read from `positional_embedding`, the others from `positional_embedding_res`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from .modeling_clipmoe import CLIPMoEModel
from .timm_layout import trunk_to_ours
from .weights import State, Tensors, split

KEPT_POSITIONS = 20
OFFICIAL_POSITIONS = 248
# As in OpenAI's models on the hub: the end mark 2 stands for the rule that a text's feature is that of its largest id.
TEXT_MARKS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
VISION_BLOCKS = ("visual.transformer.resblocks.", "vision_model.encoder.layers.")
TEXT_BLOCKS = ("transformer.resblocks.", "text_model.encoder.layers.")
# Ours to theirs, with the place where weight and bias go.
OUTSIDE_FFN = {"layer_norm1": "ln_1.{}", "layer_norm2": "ln_2.{}", "self_attn.qkv": "attn.in_proj_{}",
               "self_attn.out_proj": "attn.out_proj.{}"}
FFN = {"mlp.fc1": "mlp.c_fc.{}", "mlp.fc2": "mlp.c_proj.{}"}
LINEARS = (("c_fc", "fc1"), ("c_proj", "fc2"))
KINDS = ("weight", "bias")
FIXED = {"vision": {"class_token": True, "patch_bias": False, "pre_norm": True, "pooling": "cls",
                    "projection": "linear", "projection_bias": False},
         "text": {"is_causal": True, "projection": "linear", "projection_bias": False}}
# In OpenAI's archives beside the weights; all but the last is read off the weights' shapes.
CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def names_to_ours(state: State, config: CLIPMoEConfig, source: str | Path) -> State:
    """A state dict under OpenAI's names, its vision tower possibly timm's -> the same weights under ours.

    Raises:
        ValueError: a tensor that `config` asks for is missing, or one is left over.
    """
    # open_clip's CustomTextCLIP is the same model with its text tower in a module of its own.
    prefix = "text." if "text.token_embedding.weight" in state else ""
    tensors = Tensors({name[len(prefix):] if name.startswith(prefix) else name: tensor
                       for name, tensor in state.items() if name not in CONSTANTS}, source)
    is_timm = any(name.startswith("visual.trunk.") for name in state)
    ours = (trunk_to_ours if is_timm else _vision_to_ours)(tensors, config.vision_config)
    ours |= _text_to_ours(tensors, config.text_config)
    ours["logit_scale"] = tensors.take("logit_scale").reshape(())
    if config.logit_bias_init_value is not None:
        ours["logit_bias"] = tensors.take("logit_bias").reshape(())
    tensors.end()
    return ours


def _vision_to_ours(tensors: Tensors, config: CLIPMoEVisionConfig) -> State:
    ours = {
        "vision_model.embeddings.class_embedding": tensors.take("visual.class_embedding"),
        "vision_model.embeddings.patch_embedding.weight": tensors.take("visual.conv1.weight"),
        "vision_model.embeddings.position_embedding.weight": tensors.take("visual.positional_embedding"),
        "visual_projection.weight": tensors.take("visual.proj").T.contiguous(),
    }
    if config.pre_norm:
        ours |= tensors.linear("visual.ln_pre", "vision_model.pre_layrnorm")
    ours |= tensors.linear("visual.ln_post", "vision_model.post_layernorm")
    if config.pooling == "attention":
        ours |= _pooler_to_ours(tensors, "visual.attn_pool.", "vision_model.head.")
    return ours | _blocks_to_ours(tensors, config, *VISION_BLOCKS)


def _pooler_to_ours(tensors: Tensors, theirs: str, ours: str) -> State:
    # The first query alone makes the picture's feature; the others are for CoCa's decoder.
    state = {f"{ours}query": tensors.take(f"{theirs}query")[0].clone()}
    state |= split(tensors.take(f"{theirs}attn.in_proj_bias"), "qkv", f"{ours}{{}}_proj.bias")
    if f"{theirs}attn.in_proj_weight" in tensors.rest:
        state |= split(tensors.take(f"{theirs}attn.in_proj_weight"), "qkv", f"{ours}{{}}_proj.weight")
    else:  # torch keeps the three apart where tokens and query differ in size
        state |= {f"{ours}{part}_proj.weight": tensors.take(f"{theirs}attn.{part}_proj_weight") for part in "qkv"}
    for their_name, our_name in (("attn.out_proj", "out_proj"), ("ln_q", "query_norm"), ("ln_k", "token_norm")):
        state |= tensors.linear(theirs + their_name, ours + our_name)
    return state


def _text_to_ours(tensors: Tensors, config: CLIPMoETextConfig) -> State:
    positions = tensors.take("positional_embedding")
    if "positional_embedding_res" in tensors.rest:
        positions = torch.cat([positions[:KEPT_POSITIONS], tensors.take("positional_embedding_res")[KEPT_POSITIONS:]])
    ours = {"text_model.embeddings.token_embedding.weight": tensors.take("token_embedding.weight"),
            "text_model.embeddings.position_embedding.weight": positions}
    ours |= tensors.linear("ln_final", "text_model.final_layer_norm")
    if config.projection_bias:
        ours |= tensors.linear("text_projection", "text_projection")
    elif config.projection == "linear":
        ours["text_projection.weight"] = tensors.take("text_projection").T.contiguous()
    return ours | _blocks_to_ours(tensors, config, *TEXT_BLOCKS)


def _blocks_to_ours(tensors: Tensors, config: CLIPMoEVisionConfig | CLIPMoETextConfig, theirs: str, ours: str) -> State:
    state: State = {}
    for block in range(config.num_hidden_layers):
        other, mine = f"{theirs}{block}.", f"{ours}{block}."
        if not config.is_moe_layer(block):
            state |= tensors.block({**OUTSIDE_FFN, **FFN}, other, mine)
            continue
        state |= tensors.block(OUTSIDE_FFN, other, mine)
        state[f"{mine}mlp.router.weight"] = tensors.take(f"{other}gate.weight")
        for their_name, our_name in LINEARS:
            for kind in KINDS:
                state[f"{mine}mlp.experts.{our_name}_{kind}"] = torch.stack(
                    [tensors.take(f"{other}experts.{expert}.{their_name}.{kind}")
                     for expert in range(config.num_experts)])
    return state


def names_to_official(model: CLIPMoEModel) -> State:
    """Our model -> the official state dict. Both position tables are written in full (each is read in part).

    Raises:
        ValueError: the official code fixes something that this model has otherwise.
    """
    _check_official(model.config)
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    official = {their_name: ours[our_name] for their_name, our_name in (
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("logit_scale", "logit_scale"),
    )}
    official["positional_embedding_res"] = official["positional_embedding"].clone()
    official["visual.proj"] = ours["visual_projection.weight"].T
    official["text_projection"] = ours["text_projection.weight"].T
    for their_name, our_name in (("visual.ln_pre", "vision_model.pre_layrnorm"),
                                 ("visual.ln_post", "vision_model.post_layernorm"),
                                 ("ln_final", "text_model.final_layer_norm")):
        official |= {f"{their_name}.{kind}": ours[f"{our_name}.{kind}"] for kind in KINDS}
    towers = (VISION_BLOCKS, model.config.vision_config), (TEXT_BLOCKS, model.config.text_config)
    for (theirs, mine), config in towers:
        for block in range(config.num_hidden_layers):
            official |= _block_to_official(ours, config.is_moe_layer(block), f"{mine}{block}.", f"{theirs}{block}.")
    return {name: tensor.contiguous() for name, tensor in official.items()}


def _block_to_official(ours: State, is_moe: bool, mine: str, theirs: str) -> State:
    official: State = {}
    for kind in KINDS:
        for our_name, their_name in {**OUTSIDE_FFN, **({} if is_moe else FFN)}.items():
            if our_name == "self_attn.qkv":
                tensor = torch.cat([ours[f"{mine}self_attn.{part}_proj.{kind}"] for part in "qkv"])
            else:
                tensor = ours[f"{mine}{our_name}.{kind}"]
            official[theirs + their_name.format(kind)] = tensor
        if is_moe:
            for their_name, our_name in LINEARS:
                for expert, tensor in enumerate(ours[f"{mine}mlp.experts.{our_name}_{kind}"]):
                    official[f"{theirs}experts.{expert}.{their_name}.{kind}"] = tensor.clone()
    if is_moe:
        official[f"{theirs}gate.weight"] = ours[f"{mine}mlp.router.weight"]
    return official


def config_of_shapes(state: State, top_k: int | None, source: str | Path) -> CLIPMoEConfig:
    """What the shapes of an OpenAI or official CLIP-MoE state dict say; heads are 64 wide, the activation is QuickGELU.

    Raises:
        ValueError: `top_k` is missing or out of range, or given for a dense model.
    """
    for name in ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight",
                 "positional_embedding"):
        if name not in state:
            raise ValueError(f"{source} has no tensor {name}, which OpenAI's ViTs and the official CLIP-MoE have")
    vision, text = (_tower_of_shapes(state, prefix, top_k, source) for prefix in (VISION_BLOCKS[0], TEXT_BLOCKS[0]))
    if top_k is not None and vision["num_experts"] == text["num_experts"] == 1:
        raise ValueError(f"{source} has no experts, so --top-k does not apply")
    patch_size = state["visual.conv1.weight"].shape[-1]
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return CLIPMoEConfig(
        vision_config={**vision, "patch_size": patch_size, "image_size": grid * patch_size},
        text_config={**text, **TEXT_MARKS, "vocab_size": state["token_embedding.weight"].shape[0],
                     "max_position_embeddings": state["positional_embedding"].shape[0]},
        projection_dim=state["visual.proj"].shape[1],
    )


def _tower_of_shapes(state: State, prefix: str, top_k: int | None, source: str | Path) -> dict[str, Any]:
    depth = _depth(state, prefix)
    if depth == 0:
        raise ValueError(f"{source} has no blocks {prefix}*, which OpenAI's ViTs and the official CLIP-MoE have")
    experts = [_experts(state, f"{prefix}{block}.") for block in range(depth)]
    # The last block is a mixture if any is: the official code counts its MoE layers from the end.
    num_experts = experts[-1] or 1
    if num_experts > 1 and (top_k is None or not 1 <= top_k <= num_experts):
        raise ValueError(f"{source} is an official CLIP-MoE of {num_experts} experts, and it does not say how many of "
                         f"them a token uses: give --top-k 1..{num_experts} (the published model uses 2)")
    fc1 = f"{prefix}{depth - 1}." + ("experts.0." if experts[-1] else "mlp.") + "c_fc.weight"
    if fc1 not in state:
        raise ValueError(f"{source} has no tensor {fc1}, which OpenAI's ViTs and the official CLIP-MoE have")
    intermediate_size, width = state[fc1].shape
    return {
        "hidden_size": width, "intermediate_size": intermediate_size, "num_hidden_layers": depth,
        "num_attention_heads": width // 64, "activation": "quick_gelu", "num_experts": num_experts,
        "num_experts_per_tok": top_k if num_experts > 1 else 1, "first_moe_layer": experts.count(0) % depth,
    }


def _depth(state: State, prefix: str) -> int:
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def _experts(state: State, prefix: str) -> int:
    start = f"{prefix}experts."
    return len({name[len(start):].split(".")[0] for name in state if name.startswith(start)})


def _check_official(config: CLIPMoEConfig) -> None:
    vision, text = config.vision_config, config.text_config
    for name, tower in (("vision", vision), ("text", text)):
        fixed = [
            ("activation", tower.activation, "quick_gelu"),
            ("layer_norm_eps", tower.layer_norm_eps, 1e-5),
            ("num_attention_heads", tower.num_attention_heads, tower.hidden_size // 64),
            ("intermediate_size", tower.intermediate_size, 4 * tower.hidden_size),
            *((key, getattr(tower, key), value) for key, value in FIXED[name].items()),
        ]
        for key, found, expected in fixed:
            if found != expected:
                raise ValueError(f"the official code fixes {key} of the {name} tower at {expected}, this model has "
                                 f"{found}")
        for key in ("balance_bias", "base_gate"):
            if getattr(tower, key):
                raise ValueError(f"the official code has no place for the {key} of the {name} tower; only a CLIP-MoE "
                                 "made without it can be exported")
    if config.logit_bias_init_value is not None:
        raise ValueError("the official code has no logit bias, this model has one")
    if text.pooling != "argmax" and (text.pooling, text.eos_token_id) != ("eos", text.vocab_size - 1):
        raise ValueError("the official code reads a text's feature at its largest token id, this model pools by "
                         f"'{text.pooling}'")
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
