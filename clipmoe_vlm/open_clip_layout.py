"""open_clip's model configurations against ours. Its tensors' names are in `openai_layout` and `timm_layout`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .configuration_clipmoe import CLIPMoEConfig
from .openai_layout import TEXT_MARKS
from .timm_layout import config_of_trunk, square
from .weights import read_json

# What may be said about a model that stays a plain ViT with a plain text transformer; the rest would change it.
MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale",
              "init_logit_bias", "nonscalar_logit_scale"}
VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
               "output_tokens", "no_ln_pre", "pool_type", "final_ln_after_pool", "pos_embed_type", "attentional_pool",
               "attn_pooler_queries", "attn_pooler_heads", "act_kwargs", "norm_kwargs"}
TIMM_KEYS = {"timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
             "timm_drop_path", "image_size", "patch_dropout", "output_tokens"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id", "pool_type",
             "no_causal_mask", "proj_type", "proj_bias", "output_tokens", "act_kwargs", "norm_kwargs",
             "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}
ONLY_PLAIN = "supported are plain ViTs (open_clip's or timm's) with open_clip's plain text transformer"


def architecture_values(architecture: str) -> dict[str, Any]:
    """open_clip's model configuration by its name or from a file.

    Raises:
        ValueError: it is neither a file nor a name that open_clip knows.
    """
    if Path(architecture).is_file():
        values = read_json(Path(architecture))
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


def config_of_open_clip(values: dict[str, Any], source: str | Path) -> CLIPMoEConfig:
    """open_clip's model configuration (`embed_dim`, `vision_cfg`, `text_cfg`) -> ours.

    Raises:
        ValueError: anything in it that makes more of it than two plain transformers.
    """
    if not isinstance(values.get("vision_cfg"), dict) or not isinstance(values.get("text_cfg"), dict):
        raise ValueError(f"{source} is no open_clip model configuration: it lacks vision_cfg or text_cfg")
    vision, text = values["vision_cfg"], values["text_cfg"]
    if values.get("multimodal_cfg"):
        raise ValueError(f"{source} is a CoCa (it has a multimodal_cfg); {ONLY_PLAIN}")
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"{source} has a ResNet for its vision tower (layers {vision['layers']}); {ONLY_PLAIN}")
    if text.get("hf_model_name"):
        raise ValueError(f"{source} has the transformers text tower '{text['hf_model_name']}'; {ONLY_PLAIN}")
    _refuse_others(values, MODEL_KEYS, f"{source}")
    quick_gelu = bool(values.get("quick_gelu"))
    if vision.get("timm_model_name"):
        _refuse_others(vision, TIMM_KEYS, f"{source}: vision_cfg")
        vision_config = config_of_trunk(vision, values["embed_dim"], source)
    else:
        _refuse_others(vision, VISION_KEYS, f"{source}: vision_cfg")
        vision_config = _vision_values(vision, quick_gelu, source)
    _refuse_others(text, TEXT_KEYS, f"{source}: text_cfg")
    return CLIPMoEConfig(vision_config=vision_config, text_config=_text_values(text, quick_gelu, source),
                         projection_dim=values["embed_dim"], logit_bias_init_value=values.get("init_logit_bias"))


def _vision_values(values: dict[str, Any], quick_gelu: bool, source: str | Path) -> dict[str, Any]:
    width = values.get("width", 768)
    pool_type, attentional = values.get("pool_type", "tok"), values.get("attentional_pool") or False
    if (attentional, pool_type) not in ((False, "tok"), (False, "avg"), (True, "tok")):
        raise ValueError(f"{source}: vision_cfg has attentional_pool = {attentional!r} with pool_type = '{pool_type}'; "
                         "supported are pool_type 'tok' and 'avg', and attentional_pool true with pool_type 'tok'")
    return {
        **_common_values(values, width, quick_gelu, source),
        "num_attention_heads": width // values.get("head_width", 64),
        "image_size": square(values.get("image_size", 224), source),
        "patch_size": square(values.get("patch_size", 16), source),
        "pre_norm": not values.get("no_ln_pre"),
        "pooling": "attention" if attentional else {"tok": "cls", "avg": "avg"}[pool_type],
        "num_pooling_heads": values.get("attn_pooler_heads", 8) if attentional else None,
        "norm_after_pooling": bool(pool_type == "tok" or values.get("final_ln_after_pool")),
    }


def _text_values(values: dict[str, Any], quick_gelu: bool, source: str | Path) -> dict[str, Any]:
    pool_type = values.get("pool_type", "argmax")
    if pool_type not in ("argmax", "eos", "first", "last"):
        raise ValueError(f"{source}: text_cfg has pool_type = '{pool_type}'; supported are argmax, eos, first and last")
    width, projection = values.get("width", 512), values.get("proj_type", "linear")
    return {
        **_common_values(values, width, quick_gelu, source),
        "num_attention_heads": values.get("heads", 8),
        "vocab_size": values.get("vocab_size", 49408),
        "max_position_embeddings": values.get("context_length", 77),
        **TEXT_MARKS, "pad_token_id": values.get("pad_id", 0), "eos_token_id": values.get("eos_id", 2),
        "is_causal": not values.get("no_causal_mask"),
        "pooling": pool_type,
        "projection": "none" if projection == "none" else "linear",
        "projection_bias": projection != "none" and bool(values.get("proj_bias")),
    }


def _common_values(values: dict[str, Any], width: int, quick_gelu: bool, source: str | Path) -> dict[str, Any]:
    act, norm = values.get("act_kwargs") or {}, values.get("norm_kwargs") or {}
    if act not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or (act and quick_gelu) or {*norm} - {"eps"}:
        raise ValueError(f"{source} has act_kwargs = {act} and norm_kwargs = {norm}; supported are GELU's approximate "
                         "'tanh' or 'none', and the norm's eps")
    activation = "gelu_pytorch_tanh" if act.get("approximate") == "tanh" else "gelu"
    return {
        "hidden_size": width, "intermediate_size": int(width * values.get("mlp_ratio", 4.0)),
        "num_hidden_layers": values.get("layers", 12), "activation": "quick_gelu" if quick_gelu else activation,
        "layer_norm_eps": norm.get("eps", 1e-5),
    }


def _refuse_others(values: dict[str, Any], known: set[str], where: str) -> None:
    for key, value in values.items():
        if key not in known and value:
            raise ValueError(f"{where} has {key} = {value!r}; {ONLY_PLAIN}")
