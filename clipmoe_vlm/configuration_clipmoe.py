"""Configuration of CLIP-MoE: two transformer towers whose feed-forward layers may be sparse mixtures of experts."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

PROJECTIONS = ("linear", "mlp", "none")
VISION_POOLING = ("cls", "avg", "map", "attention")
TEXT_POOLING = ("eos", "argmax", "first", "last")
TOWERS = ("vision_config", "text_config")
FORMAT = 1  # raise it when a folder written before would now be read as another model

# The original LLaVA opens any existing folder with transformers' CLIPVisionModel, which would leave the experts out and
# make up feed-forward layers at random. Every CLIP class looks `hidden_act` up in a table of activations: finding this
# sentence in config.json, it raises KeyError with it.
NOT_A_PLAIN_CLIP = (
    "This folder holds a CLIP-MoE, which transformers' own CLIP classes would read with random weights. In LLaVA, "
    "start the script with python -m clipmoe_vlm.llava SCRIPT ..., or import clipmoe_vlm.llava first. Elsewhere, "
    "import clipmoe_vlm and use AutoModel, CLIPMoEVisionModel or CLIPMoEModel."
)


class _Config(PretrainedConfig):
    """What all our configurations have in common: hosts that do not know them fail, and they refuse those of others.

    `hidden_act` is no field of ours (the activation is `activation`) but a note to other people's CLIP classes.

    Raises:
        ValueError: values of another model type or in another format, or an activation as `hidden_act`.
    """

    def __init__(self, **kwargs: Any):
        ours = type(self).model_type
        found = kwargs.pop("model_type", ours)
        if found != ours:
            raise ValueError(f"a configuration with model_type '{found}' is none of a {ours}; of other CLIPs, "
                             "`python -m clipmoe_vlm convert SOURCE FOLDER` makes a folder to load")
        version = kwargs.pop("format", FORMAT)
        if version != FORMAT:
            raise ValueError(f"this {ours} was written in format {version}, and this clipmoe_vlm reads format "
                             f"{FORMAT}: install the clipmoe_vlm that it was written with")
        if kwargs.pop("hidden_act", NOT_A_PLAIN_CLIP) in ACT2FN:
            raise ValueError(f"a {ours} has its activation in the field `activation`; `hidden_act` holds a note for "
                             "programs that do not know the model")
        for tower in TOWERS:  # in a tower's own configuration: the note of `to_diff_dict`
            kwargs.pop(tower, None)
        _refuse_unknown(ours, kwargs)
        super().__init__(**kwargs)
        self.format = FORMAT
        self.hidden_act = NOT_A_PLAIN_CLIP

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json gets: the note also where CLIPModel looks for its towers."""
        values = super().to_diff_dict()
        for tower in TOWERS:
            values.setdefault(tower, {})["hidden_act"] = NOT_A_PLAIN_CLIP
        return values


class _TowerConfig(_Config):
    """What both towers share. A tower with `num_experts=1` is dense.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, layer_norm_eps: as in CLIP.
        activation: CLIP's `hidden_act`, a name of transformers' activations.
        projection_dim: size of the space that pictures and texts share.
        projection: from the pooled feature into that space: "linear", "mlp" (timm's head in open_clip: two linears
            with a GELU between, `2 * projection_dim` wide inside), or "none" (the pooled feature is in it already).
        projection_bias: whether the (last) linear of the projection has a bias.
        num_experts: experts per MoE layer; expert 0 is the base's own feed-forward layer.
        num_experts_per_tok: experts that each token goes through (top_k).
        first_moe_layer: index of the first block with experts; the blocks before it are dense.
        expert_dropout: dropout between the activation and the second linear of an expert, in training mode.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5) in `aux_loss`.
        balance_bias: routers have a bias for the choice of experts alone (see `moe.Router`).
        base_gate: MoE layers have a gate between the base and the mixture (see `moe.SparseMoE`).
        initializer_range: standard deviation of weights that no checkpoint brings.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        activation: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        projection_dim: int = 512,
        projection: str = "linear",
        projection_bias: bool = False,
        num_experts: int = 1,
        num_experts_per_tok: int = 1,
        first_moe_layer: int = 0,
        expert_dropout: float = 0.0,
        router_z_loss_coef: float = 0.0,
        balance_bias: bool = False,
        base_gate: bool = False,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.activation = activation
        self.layer_norm_eps = layer_norm_eps
        self.projection_dim = projection_dim
        self.projection = projection
        self.projection_bias = projection_bias
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.first_moe_layer = first_moe_layer
        self.expert_dropout = expert_dropout
        self.router_z_loss_coef = router_z_loss_coef
        self.balance_bias = balance_bias
        self.base_gate = base_gate
        self.initializer_range = initializer_range
        _check_choice("activation", activation, tuple(ACT2FN))
        _check_choice("projection", projection, PROJECTIONS)
        if projection == "none" and self.pooled_size != projection_dim:
            raise ValueError(f"without a projection the pooled feature of {self.pooled_size} channels must have "
                             f"projection_dim ({projection_dim}) of them")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_attention_heads}")
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok {num_experts_per_tok} must lie in 1..num_experts ({num_experts})")
        if not 0 <= first_moe_layer <= num_hidden_layers:
            raise ValueError(f"first_moe_layer {first_moe_layer} must lie in 0..{num_hidden_layers} (all blocks)")
        super().__init__(**kwargs)

    @property
    def pooled_size(self) -> int:
        """Size of the pooled feature, before the projection."""
        return self.hidden_size

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 1 and layer >= self.first_moe_layer


class CLIPMoEVisionConfig(_TowerConfig):
    """The vision tower: a ViT of square patches. The defaults are CLIP's.

    Args:
        image_size, patch_size: sides of pictures and patches in pixels.
        class_token: whether a learned token stands before the patches.
        patch_bias: whether the patch embedding has a bias.
        pre_norm: whether there is a norm before the first block.
        pooling: what the picture's feature is made of: "cls" (the class token), "avg" (the mean of the patches), "map"
            (SigLIP's head: a learned query attends to the patches, then an MLP beside a residual), or "attention"
            (open_clip's attentional pooler: a learned query attends to all tokens, into `projection_dim` channels).
        num_pooling_heads: attention heads of "map" and "attention" (default: as in the blocks).
        norm_after_pooling: whether the final norm follows the pooling or goes before it ("cls": the same).
    """

    model_type = "clip_moe_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 32,
        num_channels: int = 3,
        class_token: bool = True,
        patch_bias: bool = False,
        pre_norm: bool = True,
        pooling: str = "cls",
        num_pooling_heads: int | None = None,
        norm_after_pooling: bool = True,
        **kwargs: Any,
    ):
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.class_token = class_token
        self.patch_bias = patch_bias
        self.pre_norm = pre_norm
        self.pooling = pooling
        self.num_pooling_heads = num_pooling_heads
        self.norm_after_pooling = norm_after_pooling
        _check_choice("pooling", pooling, VISION_POOLING)
        if pooling == "cls" and not class_token:
            raise ValueError("pooling 'cls' needs a class token (class_token: true)")
        super().__init__(**kwargs)

    @property
    def pooled_size(self) -> int:
        return self.projection_dim if self.pooling == "attention" else self.hidden_size

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> CLIPMoEVisionConfig:
        """Also takes the folder of a whole CLIP-MoE and picks its vision part."""
        values, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        whole = values.get("model_type") == CLIPMoEConfig.model_type
        return cls.from_dict(values["vision_config"] if whole else values, **kwargs)


class CLIPMoETextConfig(_TowerConfig):
    """The text tower. The defaults are CLIP's.

    Args:
        is_causal: whether a token sees only those before it; else it sees all, padding too.
        pooling: the position whose feature stands for the whole text: "eos" (the first `eos_token_id`), "argmax" (the
            largest token id), "first" or "last". Default: "eos", or as in transformers' CLIP "argmax" if
            `eos_token_id=2` (what OpenAI's code does).
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
        is_causal: bool = True,
        pooling: str | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.is_causal = is_causal
        self.pooling = pooling or ("argmax" if eos_token_id == 2 else "eos")
        _check_choice("pooling", self.pooling, TEXT_POOLING)
        super().__init__(hidden_size=hidden_size, intermediate_size=intermediate_size,
                         num_attention_heads=num_attention_heads, **kwargs)
        # After super().__init__: transformers 4 sets these itself from its keywords, transformers 5 no longer does.
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id


class CLIPMoEConfig(_Config):
    """Both towers.

    Args:
        vision_config, text_config: keyword arguments of `CLIPMoEVisionConfig` and `CLIPMoETextConfig`, or instances.
        projection_dim: size of the shared space; both towers take it over.
        logit_scale_init_value: natural logarithm of the logit scale at initialisation.
        logit_bias_init_value: what is added to every logit at initialisation (SigLIP); None: no such parameter.
    """

    model_type = "clip_moe"
    sub_configs = {"vision_config": CLIPMoEVisionConfig, "text_config": CLIPMoETextConfig}

    def __init__(
        self,
        vision_config: dict | CLIPMoEVisionConfig | None = None,
        text_config: dict | CLIPMoETextConfig | None = None,
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        logit_bias_init_value: float | None = None,
        **kwargs: Any,
    ):
        self.vision_config = _as(CLIPMoEVisionConfig, vision_config, projection_dim)
        self.text_config = _as(CLIPMoETextConfig, text_config, projection_dim)
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value = logit_bias_init_value
        super().__init__(**kwargs)


def _as(config_class: type, value: Any, projection_dim: int) -> Any:
    values = value.to_dict() if isinstance(value, PretrainedConfig) else dict(value or {})
    return config_class(**{**values, "projection_dim": projection_dim})


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} '{value}' must be one of {', '.join(choices)}")


def _refuse_unknown(model_type: str, values: dict[str, Any]) -> None:
    """Raises ValueError for a field that is neither ours nor one that transformers puts into every configuration."""
    # The names that are added are written by some versions of transformers and unknown to others.
    transformers = {*PretrainedConfig().to_dict(), "attn_implementation", "auto_map", "dtype", "name_or_path",
                    "quantization_config", "torch_dtype", "use_cache"}
    unknown = sorted(name for name in values if name not in transformers and not name.startswith("_"))
    if unknown:
        raise ValueError(f"a {model_type} has no field {', '.join(unknown)}: either it is misspelt, or a newer "
                         "clipmoe_vlm wrote it, which must then be installed to read it")
