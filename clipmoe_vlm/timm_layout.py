"""timm's plain ViTs as open_clip carries them (`visual.trunk.*` and a projection in `visual.head.*`), against ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_clipmoe import CLIPMoEVisionConfig
from .weights import State, Tensors, split

BLOCK = {"layer_norm1": "norm1.{}", "self_attn.qkv": "attn.qkv.{}", "self_attn.out_proj": "attn.proj.{}",
         "layer_norm2": "norm2.{}", "mlp.fc1": "mlp.fc1.{}", "mlp.fc2": "mlp.fc2.{}"}
POOLING = {"token": "cls", "avg": "avg", "map": "map"}
PLAIN = "supported are plain ViTs (timm's VisionTransformer with token, avg or map pooling, as in SigLIP)"


def config_of_trunk(values: dict[str, Any], embed_dim: int, source: str | Path) -> dict[str, Any]:
    """open_clip's `vision_cfg` with a `timm_model_name` -> arguments of `CLIPMoEVisionConfig`.

    timm's code alone knows what its model names mean, so the model itself is asked, built without memory for weights.

    Raises:
        ValueError: timm has no such model, or it is more than a plain ViT.
    """
    name, pool = values["timm_model_name"], values.get("timm_pool", "avg")
    where = f"{source}: the timm vision tower '{name}'"
    try:
        import timm
        from open_clip.timm_model import TimmModel
        from timm.layers import Mlp, PatchEmbed
        from timm.models.vision_transformer import Attention, Block, VisionTransformer
    except ImportError:
        raise ValueError(f"{where} is known to timm alone: pip install open_clip_torch timm") from None
    if not timm.is_model(name):
        raise ValueError(f"{where} is unknown to the installed timm {timm.__version__}")
    if pool and pool not in POOLING:
        raise ValueError(f"{where} is pooled by timm_pool '{pool}'; {PLAIN}")
    projection = values.get("timm_proj", "linear")
    with torch.device("meta"):
        tower = TimmModel(name, embed_dim, pool=pool, proj=projection, proj_bias=values.get("timm_proj_bias", False))
    trunk = tower.trunk
    if type(trunk) is not VisionTransformer:
        raise ValueError(f"{where} is a {type(trunk).__name__}; {PLAIN}")
    block = trunk.blocks[0]
    for module, plain in ((trunk.patch_embed, PatchEmbed), (block, Block), (block.attn, Attention), (block.mlp, Mlp),
                          (block.ls1, nn.Identity), (block.attn.q_norm, nn.Identity)):
        if type(module) is not plain:
            raise ValueError(f"{where} has a {type(module).__name__} inside; {PLAIN}")
    if trunk.num_reg_tokens:
        raise ValueError(f"{where} has {trunk.num_reg_tokens} register tokens; {PLAIN}")
    norm = trunk.norm if isinstance(trunk.fc_norm, nn.Identity) else trunk.fc_norm
    if trunk.global_pool not in POOLING or trunk.pool_include_prefix or not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"{where} has pooling '{trunk.global_pool}' and a final {type(norm).__name__}; {PLAIN}")
    return {
        "hidden_size": trunk.embed_dim, "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks), "num_attention_heads": block.attn.num_heads,
        "activation": _activation(block.mlp.act, where), "layer_norm_eps": norm.eps,
        "image_size": square(trunk.patch_embed.img_size, where),
        "patch_size": square(trunk.patch_embed.patch_size, where),
        "class_token": trunk.cls_token is not None, "patch_bias": trunk.patch_embed.proj.bias is not None,
        "pre_norm": isinstance(trunk.norm_pre, nn.LayerNorm), "pooling": POOLING[trunk.global_pool],
        "norm_after_pooling": norm is trunk.fc_norm,
        # Without a projection named, timm's own classifier is it.
        "projection": projection or "linear",
        "projection_bias": values.get("timm_proj_bias", False) if projection else True,
    }


def trunk_to_ours(tensors: Tensors, config: CLIPMoEVisionConfig) -> State:
    """Takes `visual.*` and gives the vision tower and its projection under our names."""
    trunk, ours = "visual.trunk.", "vision_model."
    state = tensors.linear(f"{trunk}patch_embed.proj", f"{ours}embeddings.patch_embedding", config.patch_bias)
    positions = tensors.take(f"{trunk}pos_embed")[0]
    if config.class_token:
        state[f"{ours}embeddings.class_embedding"] = tensors.take(f"{trunk}cls_token").flatten()
        if len(positions) == config.num_patches:  # timm's no_embed_class: the class token has no position
            positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    state[f"{ours}embeddings.position_embedding.weight"] = positions
    if config.pre_norm:
        state |= tensors.linear(f"{trunk}norm_pre", f"{ours}pre_layrnorm")
    for block in range(config.num_hidden_layers):
        state |= tensors.block(BLOCK, f"{trunk}blocks.{block}.", f"{ours}encoder.layers.{block}.")
    state |= tensors.linear(f"{trunk}{'fc_norm' if config.norm_after_pooling else 'norm'}", f"{ours}post_layernorm")
    if config.pooling == "map":
        state |= _map_head(tensors, f"{trunk}attn_pool.", f"{ours}head.")
    return state | _projection(tensors, config)


def _map_head(tensors: Tensors, theirs: str, ours: str) -> dict[str, Tensor]:
    state = {f"{ours}query": tensors.take(f"{theirs}latent").flatten()}
    for kind in ("weight", "bias"):
        state |= split(tensors.take(f"{theirs}kv.{kind}"), "kv", f"{ours}{{}}_proj.{kind}")
    for their_name, our_name in (("q", "q_proj"), ("proj", "out_proj"), ("norm", "mlp_norm"), ("mlp.fc1", "mlp.fc1"),
                                 ("mlp.fc2", "mlp.fc2")):
        state |= tensors.linear(theirs + their_name, ours + our_name)
    return state


def _projection(tensors: Tensors, config: CLIPMoEVisionConfig) -> State:
    if config.projection == "linear":
        name = "visual.head.proj" if "visual.head.proj.weight" in tensors.rest else "visual.trunk.head"
        return tensors.linear(name, "visual_projection", config.projection_bias)
    if config.projection == "mlp":
        return (tensors.linear("visual.head.mlp.fc1", "visual_projection.fc1")
                | tensors.linear("visual.head.mlp.fc2", "visual_projection.fc2", config.projection_bias))
    return {}


def _activation(module: nn.Module, where: str) -> str:
    name = type(module).__name__
    if isinstance(module, nn.GELU):
        name += f" ({module.approximate})"
    known = {"GELU (none)": "gelu", "GELU (tanh)": "gelu_pytorch_tanh", "GELUTanh": "gelu_pytorch_tanh",
             "QuickGELU": "quick_gelu"}
    if name not in known:
        raise ValueError(f"{where} has the activation {name}; supported are GELU, tanh GELU and QuickGELU")
    return known[name]


def square(size: int | Sequence[int], where: str | Path) -> int:
    """The side of a picture or patch that is given by its side or by height and width."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{where}: pictures and patches must be square, found {size}")
    return sides.pop()
