"""CLIP-MoE: CLIP's two towers with sparse mixtures of experts for feed-forward layers.

Plain torch modules under `PreTrainedModel`, with attention through `scaled_dot_product_attention`, so that one file
runs from transformers 4.36 to today's. Module names follow transformers' CLIP.
Shapes: B batch, T tokens, D hidden size, E experts, C channels, P projection size.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig, _TowerConfig
from .encoder import CLIPMoEEncoder, CLIPMoEMLP, CLIPMoETowerOutput, HiddenStatesWanted, attention
from .moe import Experts, Router


@dataclass
class CLIPMoEOutput(ModelOutput):
    """CLIP's output (`logits_per_image` `[B, B']`, normalised embeddings `[B, P]`) and both towers' balance losses."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: CLIPMoETowerOutput | None = None
    vision_model_output: CLIPMoETowerOutput | None = None
    image_balance_loss: Tensor | None = None
    text_balance_loss: Tensor | None = None


def interpolate_positions(weight: Tensor, class_tokens: int, old_grid: tuple[int, int],
                          new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings for another grid of patches, bicubic as in transformers' CLIP, in float32 inside.

    Args:
        weight: `[class_tokens + h * w, D]`: positions of class tokens, which are kept, then of the patches row by row.
        old_grid: `(h, w)`.
        new_grid: `(h', w')`.

    Returns:
        `[class_tokens + h' * w', D]` in the dtype of `weight`; differentiable.

    Raises:
        ValueError: `weight` has not that many positions.
    """
    if len(weight) != class_tokens + old_grid[0] * old_grid[1]:
        raise ValueError(f"{len(weight)} positions are not those of {class_tokens} class tokens and a grid of "
                         f"{old_grid[0]}x{old_grid[1]} patches")
    if tuple(new_grid) == tuple(old_grid):
        return weight
    grid = weight[class_tokens:].float().T.unflatten(1, old_grid).unsqueeze(0)
    grid = F.interpolate(grid, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([weight[:class_tokens], grid.squeeze(0).flatten(1).T.to(weight.dtype)])


class CLIPMoEVisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPMoEVisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.class_token else None
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size,
                                         bias=config.patch_bias)
        self.position_embedding = nn.Embedding(config.num_patches + config.class_token, config.hidden_size)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """`[B, C, H, W]` -> `[B, T, D]`: the class token, if there is one, then the patches row by row."""
        positions = self._positions(*pixel_values.shape[-2:], pixel_values.device, interpolate_pos_encoding)
        tokens = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            class_token = self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
            tokens = torch.cat([class_token, tokens], dim=1)
        return tokens + positions

    def _positions(self, height: int, width: int, device: torch.device, interpolate: bool) -> Tensor:
        """`[T, D]` for pictures of this size."""
        size, patch = self.config.image_size, self.config.patch_size
        # Through its forward, not by its weight: device_map may have put the table elsewhere.
        positions = self.position_embedding(torch.arange(self.position_embedding.num_embeddings, device=device))
        if (height, width) == (size, size):
            return positions
        if not interpolate:
            raise ValueError(f"this tower takes pictures of {size}x{size} pixels, got {height}x{width}: prepare them "
                             "with the image processor of its folder, or pass interpolate_pos_encoding=True")
        if height % patch or width % patch:
            raise ValueError(f"pictures of {height}x{width} pixels cannot be cut into patches of {patch}x{patch}: both "
                             f"sides must be multiples of {patch}")
        side = size // patch
        return interpolate_positions(positions, int(self.config.class_token), (side, side),
                                     (height // patch, width // patch))


class CLIPMoEPoolingHead(nn.Module):
    """One learned query attends to the tokens: SigLIP's head (pooling "map") or open_clip's pooler ("attention").

    Outside the blocks, so never a mixture of experts.
    """

    def __init__(self, config: CLIPMoEVisionConfig):
        super().__init__()
        self.config = config
        size, pooled_size = config.hidden_size, config.pooled_size
        self.num_heads = config.num_pooling_heads or config.num_attention_heads
        self.query = nn.Parameter(torch.empty(pooled_size))
        self.q_proj = nn.Linear(pooled_size, pooled_size)
        self.k_proj = nn.Linear(size, pooled_size)
        self.v_proj = nn.Linear(size, pooled_size)
        self.out_proj = nn.Linear(pooled_size, pooled_size)
        is_map = config.pooling == "map"
        # open_clip leaves these two at torch's eps, whatever that of the blocks is.
        self.query_norm = None if is_map else nn.LayerNorm(pooled_size)
        self.token_norm = None if is_map else nn.LayerNorm(size)
        self.mlp_norm = nn.LayerNorm(pooled_size, eps=config.layer_norm_eps) if is_map else None
        self.mlp = CLIPMoEMLP(config) if is_map else None

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, T, D]` -> `[B, pooled_size]`."""
        query = self.query
        if self.mlp is None:
            query, tokens = self.query_norm(query), self.token_norm(tokens)
        query = self.q_proj(query).expand(len(tokens), 1, -1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                             for part in (query, self.k_proj(tokens), self.v_proj(tokens)))
        pooled = self.out_proj(attention(self.config, query, key, value).flatten(1))
        return pooled if self.mlp is None else pooled + self.mlp(self.mlp_norm(pooled))[0]


class CLIPMoEVisionTransformer(nn.Module):
    def __init__(self, config: CLIPMoEVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPMoEVisionEmbeddings(config)
        # The misspelling is that of transformers' CLIP, whose names we keep.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else None
        self.encoder = CLIPMoEEncoder(config)
        normed_size = config.pooled_size if config.norm_after_pooling else config.hidden_size
        self.post_layernorm = nn.LayerNorm(normed_size, eps=config.layer_norm_eps)
        self.head = CLIPMoEPoolingHead(config) if config.pooling in ("map", "attention") else None

    def forward(self, pixel_values: Tensor, output_hidden_states: HiddenStatesWanted = None,
                interpolate_pos_encoding: bool = False, picture_mask: Tensor | None = None) -> CLIPMoETowerOutput:
        """See `CLIPMoEVisionModel.forward`."""
        tokens = self.embeddings(pixel_values, interpolate_pos_encoding)
        if self.pre_layrnorm is not None:
            tokens = self.pre_layrnorm(tokens)
        if picture_mask is not None:
            picture_mask = picture_mask.to(tokens.device).unsqueeze(1).expand(tokens.shape[:2])
        output = self.encoder(tokens, output_hidden_states, token_mask=picture_mask)
        depth = self.config.num_hidden_layers
        if output.hidden_states is None or output_hidden_states is True or output.hidden_states[depth] is not None:
            # A new output: what is assigned to a field that was None is not among a ModelOutput's keys and its tuple.
            output = CLIPMoETowerOutput(**{**output, "pooler_output": self._pool(output.last_hidden_state)})
        return output

    def _pool(self, tokens: Tensor) -> Tensor:
        """`[B, T, D]` -> `[B, pooled_size]`."""
        if not self.config.norm_after_pooling:
            tokens = self.post_layernorm(tokens)
        if self.config.pooling == "cls":
            pooled = tokens[:, 0]
        elif self.config.pooling == "attention":
            pooled = self.head(tokens)
        else:
            patches = tokens[:, 1:] if self.config.class_token else tokens
            pooled = patches.mean(1) if self.config.pooling == "avg" else self.head(patches)
        return self.post_layernorm(pooled) if self.config.norm_after_pooling else pooled


class CLIPMoETextEmbeddings(nn.Module):
    def __init__(self, config: CLIPMoETextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` -> `[B, T, D]`."""
        length, longest = input_ids.shape[-1], self.position_embedding.num_embeddings
        if length > longest:
            raise ValueError(f"a text of {length} tokens is too long for this model's {longest} positions: "
                             "tokenise with truncation=True")
        return self.token_embedding(input_ids) + self.position_embedding(torch.arange(length, device=input_ids.device))


class CLIPMoETextTransformer(nn.Module):
    def __init__(self, config: CLIPMoETextConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPMoETextEmbeddings(config)
        self.encoder = CLIPMoEEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                output_hidden_states: HiddenStatesWanted = None) -> CLIPMoETowerOutput:
        """Encodes `input_ids` `[B, T]`, padded on the right.

        A causal tower never looks at padding. One that is not looks at all of it, as SigLIP's does: pad to
        `max_position_embeddings`, with the base's own pad token. `attention_mask` `[B, T]` only takes padding out of
        the balance loss; the public code counts it in.
        """
        output = self.encoder(self.embeddings(input_ids), output_hidden_states, token_mask=attention_mask)
        last = self.final_layer_norm(output.last_hidden_state)
        pooled = last[torch.arange(len(input_ids), device=input_ids.device), self.pooled_position(input_ids)]
        return CLIPMoETowerOutput(**{**output, "last_hidden_state": last, "pooler_output": pooled})

    def pooled_position(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` -> `[B]`: the position whose feature stands for the text."""
        pooling = self.config.pooling
        if pooling == "eos":
            return (input_ids == self.config.eos_token_id).int().argmax(-1)
        if pooling == "argmax":
            return input_ids.argmax(-1)
        position = 0 if pooling == "first" else input_ids.shape[1] - 1
        return input_ids.new_full((len(input_ids),), position)

    def token_mask(self, input_ids: Tensor) -> Tensor:
        """`[B, T]` -> `[B, T]`, true where a token is part of the text and not padding."""
        if self.config.pooling in ("eos", "argmax"):
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            return positions <= self.pooled_position(input_ids)[:, None]
        # Some tokenizers pad with their end mark; that mark then counts as padding.
        return input_ids != (-1 if self.config.pad_token_id is None else self.config.pad_token_id)


def _projection(config: CLIPMoEVisionConfig | CLIPMoETextConfig) -> nn.Module:
    """Pooled features `[B, pooled_size]` -> `[B, P]`."""
    size, dim, bias = config.pooled_size, config.projection_dim, config.projection_bias
    if config.projection == "linear":
        return nn.Linear(size, dim, bias=bias)
    if config.projection == "mlp":
        return nn.Sequential(OrderedDict(fc1=nn.Linear(size, 2 * dim), act=nn.GELU(),
                                         fc2=nn.Linear(2 * dim, dim, bias=bias)))
    return nn.Identity()


class CLIPMoEPreTrainedModel(PreTrainedModel):
    """What a host of transformers' family can rely on, from 4.36 on:

    - `attn_implementation`: "eager" is written out; whatever else a host asks for or hands down ("sdpa", None,
      "flash_attention_2", ...) is torch's `scaled_dot_product_attention`, which on a GPU takes its own flash kernel in
      half precision. The package flash-attn is not needed and not used. Attention weights are not returned.
    - `torch_dtype`/`dtype` in half precision: routers, balance losses and attention's softmax stay in float32.
    - 8- and 4-bit loading quantises the plain linear layers alone; routers and the stacked experts keep their dtype.
    - `device_map`: a block is never split.
    - `torch.compile(model, fullgraph=True)`: no graph breaks. Other than in bfloat16 on a GPU with torch >= 2.10, a
      compiled MoE layer computes every expert on every token: the same numbers for E / K times the work.
    - gradient checkpointing, reentrant or not: equal losses and gradients, whichever part trains.
    """

    config_class = CLIPMoEConfig
    base_model_prefix = "clip_moe"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPMoEEncoderLayer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        # Modules do not know their tower: of a whole model, the vision tower's range counts for all.
        std = getattr(self.config, "vision_config", self.config).initializer_range
        if isinstance(module, Router):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Experts):
            for weight, bias in ((module.fc1_weight, module.fc1_bias), (module.fc2_weight, module.fc2_bias)):
                nn.init.normal_(weight, std=std)
                nn.init.zeros_(bias)
        elif isinstance(module, CLIPMoEVisionEmbeddings):
            if module.class_embedding is not None:
                nn.init.normal_(module.class_embedding, std=std)
        elif isinstance(module, CLIPMoEPoolingHead):
            nn.init.normal_(module.query, std=std)
        elif isinstance(module, CLIPMoEModel):
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                nn.init.constant_(module.logit_bias, self.config.logit_bias_init_value)

    # transformers 4 asks the first of these methods which attention to use, transformers 5 the others.
    @classmethod
    def _autoset_attn_implementation(cls, config: CLIPMoEConfig | _TowerConfig, *args: Any, **kwargs: Any) -> Any:
        for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", ()))):
            part._attn_implementation = _known_attention(config._attn_implementation_internal)
        return config

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        return _known_attention(attn_implementation)

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        return _known_attention(requested_attention)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


def _known_attention(asked: str | None) -> str:
    return "eager" if asked == "eager" else "sdpa"


class CLIPMoEVisionModel(CLIPMoEPreTrainedModel):
    """The vision tower alone: what VLMs load. Loads from its own folder or from that of a whole CLIP-MoE."""

    config_class = CLIPMoEVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection", r"^visual_projection", r"^logit_"]

    def __init__(self, config: CLIPMoEVisionConfig):
        super().__init__(config)
        self.vision_model = CLIPMoEVisionTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    def forward(self, pixel_values: Tensor, output_hidden_states: HiddenStatesWanted = None,
                return_dict: bool | None = None, interpolate_pos_encoding: bool = False,
                picture_mask: Tensor | None = None, **unused: Any) -> CLIPMoETowerOutput | tuple:
        """Encodes pictures.

        Args:
            pixel_values: `[B, C, H, W]`, of the size in the configuration.
            output_hidden_states: see `CLIPMoEEncoder.forward`; default: the configuration's.
            return_dict: False for a tuple of what is not None.
            interpolate_pos_encoding: allow pictures of another size, oblong too, whose sides are multiples of the
                patch; the position embeddings are interpolated (see `interpolate_positions`).
            picture_mask: `[B]`, true for the pictures that count in the balance loss and the z-loss (default: all).
            unused: today's Llava hands its tower whatever it was called with (`num_items_in_batch`, ...).

        Raises:
            ValueError: pictures of another size, or a hidden state out of range.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self.vision_model(pixel_values, output_hidden_states, interpolate_pos_encoding, picture_mask)
        return output.to_tuple() if return_dict is False else output


class CLIPMoEModel(CLIPMoEPreTrainedModel):
    """Both towers and their projections into one space. Dense CLIPs are the same class with one expert."""

    def __init__(self, config: CLIPMoEConfig):
        super().__init__(config)
        self.vision_model = CLIPMoEVisionTransformer(config.vision_config)
        self.text_model = CLIPMoETextTransformer(config.text_config)
        self.visual_projection = _projection(config.vision_config)
        self.text_projection = _projection(config.text_config)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        bias = config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def get_image_features(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """`[B, C, H, W]` -> image features `[B, P]`, not normalised."""
        vision = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.visual_projection(vision.pooler_output)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[B, T]` -> text features `[B, P]`, not normalised."""
        return self.text_projection(self.text_model(input_ids, attention_mask).pooler_output)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None,
                output_hidden_states: HiddenStatesWanted = None, return_dict: bool | None = None,
                interpolate_pos_encoding: bool = False) -> CLIPMoEOutput | tuple:
        """`input_ids` `[B', T]`, `pixel_values` `[B, C, H, W]` -> CLIP's outputs and both towers' balance losses.

        The other arguments are those of `CLIPMoETextTransformer.forward` and `CLIPMoEVisionModel.forward`.
        """
        vision = self.vision_model(pixel_values, output_hidden_states, interpolate_pos_encoding)
        text = self.text_model(input_ids, attention_mask, output_hidden_states)
        image_embeds = F.normalize(self.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text.pooler_output), dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        if self.logit_bias is not None:
            logits_per_text = logits_per_text + self.logit_bias
        output = CLIPMoEOutput(
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
            image_balance_loss=vision.balance_loss,
            text_balance_loss=text.balance_loss,
        )
        return output.to_tuple() if return_dict is False else output
