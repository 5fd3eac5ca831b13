"""Configuration of CLIP-MoE: two transformer towers whose feed-forward layers may be sparse mixtures of experts."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class _TowerConfig(PretrainedConfig):
    """What both towers share. A tower with `num_experts=1` is dense.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps: as in CLIP.
        projection_dim: size of the space that pictures and texts share.
        num_experts: experts per MoE layer; expert 0 is the base's own feed-forward layer.
        num_experts_per_tok: experts that each token goes through (top_k).
        first_moe_layer: index of the first block with experts; the blocks before it are dense.
        expert_dropout: dropout between the activation and the second linear of an expert, in training mode.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5) in `aux_loss`.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        projection_dim: int = 512,
        num_experts: int = 1,
        num_experts_per_tok: int = 1,
        first_moe_layer: int = 0,
        expert_dropout: float = 0.0,
        router_z_loss_coef: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.projection_dim = projection_dim
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.first_moe_layer = first_moe_layer
        self.expert_dropout = expert_dropout
        self.router_z_loss_coef = router_z_loss_coef
        self.initializer_range = initializer_range
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_attention_heads}")
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok {num_experts_per_tok} must lie in 1..num_experts ({num_experts})")
        if not 0 <= first_moe_layer <= num_hidden_layers:
            raise ValueError(f"first_moe_layer {first_moe_layer} must lie in 0..{num_hidden_layers} (all blocks)")
        super().__init__(**kwargs)

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 1 and layer >= self.first_moe_layer


class CLIPMoEVisionConfig(_TowerConfig):
    """The vision tower (a ViT with a class token and a norm before its first block)."""

    model_type = "clip_moe_vision_model"
    base_config_key = "vision_config"

    def __init__(self, image_size: int = 224, patch_size: int = 32, num_channels: int = 3, **kwargs: Any):
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> CLIPMoEVisionConfig:
        """Also takes the folder of a whole CLIP-MoE and picks its vision part."""
        values, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(values.get("vision_config", values), **kwargs)


class CLIPMoETextConfig(_TowerConfig):
    """The text tower (causal). `eos_token_id` marks the position whose feature stands for the whole text.

    As in transformers' CLIP, `eos_token_id=2` means the position of the largest token id (what OpenAI's code does).
    """

    model_type = "clip_moe_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 49406,
        eos_token_id: int | None = 49407,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        super().__init__(hidden_size=hidden_size, intermediate_size=intermediate_size,
                         num_attention_heads=num_attention_heads, **kwargs)
        # After super().__init__: transformers 4 sets these itself from its keywords, transformers 5 no longer does.
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id


class CLIPMoEConfig(PretrainedConfig):
    """Both towers.

    Args:
        vision_config, text_config: keyword arguments of `CLIPMoEVisionConfig` and `CLIPMoETextConfig`, or instances.
        projection_dim: size of the shared space; both towers take it over.
        logit_scale_init_value: natural logarithm of the logit scale at initialisation.
    """

    model_type = "clip_moe"
    sub_configs = {"vision_config": CLIPMoEVisionConfig, "text_config": CLIPMoETextConfig}

    def __init__(
        self,
        vision_config: dict | CLIPMoEVisionConfig | None = None,
        text_config: dict | CLIPMoETextConfig | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        **kwargs: Any,
    ):
        self.vision_config = _as(CLIPMoEVisionConfig, vision_config, projection_dim)
        self.text_config = _as(CLIPMoETextConfig, text_config, projection_dim)
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(**kwargs)


def _as(config_class: type, value: Any, projection_dim: int) -> Any:
    values = value.to_dict() if isinstance(value, PretrainedConfig) else dict(value or {})
    return config_class(**{**values, "projection_dim": projection_dim})
