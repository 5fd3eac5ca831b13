"""transformers' SigLIP against ours: only what stands outside the blocks differs.

SigLIP 2 with a fixed picture size is the same class. Its configuration is read as JSON, since transformers has SigLIP
from 4.37 only; published files leave out what is as in `google/siglip-base-patch16-224`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .configuration_clipmoe import CLIPMoEConfig
from .weights import State, Tensors, split

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "activation": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
BASE_VISION = {**BASE, "image_size": 224, "patch_size": 16, "num_channels": 3}
BASE_TEXT = {**BASE, "vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 49406,
             "eos_token_id": 49407}
# What every SigLIP does, in the words of our configuration.
VISION = {"class_token": False, "patch_bias": True, "pre_norm": False, "pooling": "map", "norm_after_pooling": False,
          "projection": "none"}
TEXT = {"is_causal": False, "pooling": "last", "projection_bias": True}


def config_of_siglip(values: dict[str, Any], source: str | Path) -> CLIPMoEConfig:
    """The `config.json` of a `SiglipModel` -> ours."""
    text = values.get("text_config") or {}
    text_values = _values(text, BASE_TEXT)
    return CLIPMoEConfig(
        vision_config=vision_values(values.get("vision_config") or {}, source),
        text_config={**text_values, **TEXT},
        projection_dim=text.get("projection_size") or text_values["hidden_size"],
        logit_bias_init_value=-10.0,
    )


def vision_values(values: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """A SigLIP's `vision_config` -> arguments of `CLIPMoEVisionConfig`.

    Raises:
        ValueError: the tower has no pooling head.
    """
    if values.get("vision_use_head") is False:
        raise ValueError(f"{source} has a SigLIP vision tower without its pooling head (vision_use_head: false); "
                         "supported are those with it")
    ours = _values(values, BASE_VISION)
    return {**ours, **VISION, "projection_dim": ours["hidden_size"]}


def _values(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    return {name: values.get("hidden_act" if name == "activation" else name, value) for name, value in base.items()}


def names_to_ours(state: State, source: str | Path) -> State:
    """A state dict of a `SiglipModel` or `SiglipVisionModel` -> the same weights under our names."""
    tensors = Tensors(state, source)
    theirs = ours = "vision_model.head."
    renamed = {f"{ours}query": tensors.take(f"{theirs}probe").flatten()}
    for kind in ("weight", "bias"):
        renamed |= split(tensors.take(f"{theirs}attention.in_proj_{kind}"), "qkv", f"{ours}{{}}_proj.{kind}")
    renamed |= tensors.linear(f"{theirs}attention.out_proj", f"{ours}out_proj")
    renamed |= tensors.linear(f"{theirs}layernorm", f"{ours}mlp_norm")
    if "text_model.head.weight" in tensors.rest:
        renamed |= tensors.linear("text_model.head", "text_projection")
        renamed |= {name: tensors.take(name).reshape(()) for name in ("logit_scale", "logit_bias")}
    return renamed | tensors.rest
