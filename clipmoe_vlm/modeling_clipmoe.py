"""CLIP-MoE: CLIP's two towers with sparse mixtures of experts for feed-forward layers.

Plain torch modules under `PreTrainedModel`, with attention through `scaled_dot_product_attention`, so that one file
runs from transformers 4.36 to today's. Module names follow transformers' CLIP.
Shapes: B batch, T tokens, D hidden size, E experts, C channels, P projection size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig, _TowerConfig
from .moe import Experts, Router, SparseMoE, load_balancing_loss, router_z_loss

HiddenStatesWanted = bool | int | Sequence[int] | None


@dataclass
class CLIPMoETowerOutput(ModelOutput):
    """Output of one tower.

    Attributes:
        last_hidden_state: `[B, T, D]`, the last computed block's output (the text tower's after its final norm).
        pooler_output: `[B, D]`; None if the last block was not needed.
        hidden_states: `num_hidden_layers + 1` entries `[B, T, D]`: the first block's input, then each block's output;
            None in place of a block that was not computed.
        router_logits: `[B * T, E]` for each computed MoE layer; each token's experts are those of its top k.
        aux_loss: scalar to add to a training loss: `balance_loss + router_z_loss_coef * z-loss`, or zero while no
            router trains.
        balance_loss: scalar, the measured load-balancing loss (see `moe.load_balancing_loss`); zero in a dense tower.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None


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


class CLIPMoEAttention(nn.Module):
    def __init__(self, config: _TowerConfig):
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.is_causal = getattr(config, "is_causal", False)  # pictures have no direction
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, T, D]` -> `[B, T, D]`."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CLIPMoEMLP(nn.Module):
    def __init__(self, config: _TowerConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """`[B, T, D]` -> `[B, T, D]` and, for the MoE layer's place, no router logits."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states))), None


class CLIPMoEEncoderLayer(nn.Module):
    """A pre-norm transformer block whose feed-forward layer is dense or a mixture of experts."""

    def __init__(self, config: _TowerConfig, layer: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPMoEAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.is_moe_layer(layer):
            self.mlp: nn.Module = SparseMoE(
                config.num_experts, config.num_experts_per_tok, config.hidden_size, config.intermediate_size,
                ACT2FN[config.hidden_act], config.expert_dropout, config.balance_bias, config.base_gate,
            )
        else:
            self.mlp = CLIPMoEMLP(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, T, D]` -> `[B, T, D]` and router logits `[B * T, E]` (None if dense)."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        update, router_logits = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + update, router_logits


class CLIPMoEEncoder(nn.Module):
    def __init__(self, config: _TowerConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(CLIPMoEEncoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, output_hidden_states: HiddenStatesWanted = None,
                token_mask: Tensor | None = None) -> CLIPMoETowerOutput:
        """Runs the blocks on `[B, T, D]`.

        Args:
            output_hidden_states: true for all; an index or several (negative ones from the end, 0 is the input) for
                just those, and then no block beyond the highest is computed.
            token_mask: `[B, T]`, the tokens that count in the balance loss (default: all).
        """
        depth = len(self.layers)
        wanted = wanted_hidden_states(output_hidden_states, depth)
        blocks = depth if wanted is None or isinstance(output_hidden_states, bool) else max(wanted)
        kept: list[Tensor | None] = [None] * (depth + 1)
        kept[0] = hidden_states
        router_logits = []
        for index, layer in enumerate(self.layers[:blocks], start=1):
            if self.gradient_checkpointing and self.training:
                hidden_states, logits = self._gradient_checkpointing_func(layer.__call__, hidden_states)
            else:
                hidden_states, logits = layer(hidden_states)
            if wanted is not None and index in wanted:
                kept[index] = hidden_states
            if logits is not None:
                router_logits.append(logits)
        balance_loss = aux_loss = hidden_states.new_zeros((), dtype=torch.float32)
        if router_logits:
            balance_loss = load_balancing_loss(router_logits, self.config.num_experts_per_tok,
                                               None if token_mask is None else token_mask.flatten())
            if any(module.weight.requires_grad for module in self.modules() if isinstance(module, Router)):
                aux_loss = balance_loss
                if self.config.router_z_loss_coef:
                    aux_loss = aux_loss + self.config.router_z_loss_coef * router_z_loss(router_logits)
        return CLIPMoETowerOutput(
            last_hidden_state=hidden_states,
            hidden_states=None if wanted is None else tuple(kept),
            router_logits=tuple(router_logits),
            aux_loss=aux_loss,
            balance_loss=balance_loss,
        )


def wanted_hidden_states(output_hidden_states: HiddenStatesWanted, depth: int) -> set[int] | None:
    """Indices 0..depth of the hidden states asked for, None for none of them.

    Raises:
        ValueError: an index out of range.
    """
    if output_hidden_states is None or output_hidden_states is False:
        return None
    if output_hidden_states is True:
        return set(range(depth + 1))
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else list(output_hidden_states)
    for index in indices:
        if not -depth - 1 <= index <= depth:
            raise ValueError(f"hidden state {index} does not exist: {depth} blocks have the hidden states "
                             f"{-depth - 1}..{depth}")
    return {index % (depth + 1) for index in indices}


class CLIPMoEVisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPMoEVisionConfig):
        super().__init__()
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.class_token else None
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size,
                                         bias=config.patch_bias)
        self.position_embedding = nn.Embedding(config.num_patches + config.class_token, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, T, D]`: the class token, if there is one, then the patches row by row."""
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixel_values.shape[-2:]
            raise ValueError(f"this tower takes pictures of {self.image_size}x{self.image_size} pixels, got "
                             f"{height}x{width}: prepare them with the image processor of its folder")
        tokens = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            class_token = self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
            tokens = torch.cat([class_token, tokens], dim=1)
        return tokens + self.position_embedding.weight


class CLIPMoEPoolingHead(nn.Module):
    """One learned query attends to the tokens: SigLIP's head (pooling "map") or open_clip's pooler ("attention").

    Outside the blocks, so never a mixture of experts.
    """

    def __init__(self, config: CLIPMoEVisionConfig):
        super().__init__()
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
        pooled = self.out_proj(F.scaled_dot_product_attention(query, key, value).flatten(1))
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

    def forward(self, pixel_values: Tensor, output_hidden_states: HiddenStatesWanted = None) -> CLIPMoETowerOutput:
        tokens = self.embeddings(pixel_values)
        if self.pre_layrnorm is not None:
            tokens = self.pre_layrnorm(tokens)
        output = self.encoder(tokens, output_hidden_states)
        depth = self.config.num_hidden_layers
        if output.hidden_states is None or output_hidden_states is True or output.hidden_states[depth] is not None:
            output.pooler_output = self._pool(output.last_hidden_state)
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
        return self.token_embedding(input_ids) + self.position_embedding.weight[:length]


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
        output.last_hidden_state = self.final_layer_norm(output.last_hidden_state)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        output.pooler_output = output.last_hidden_state[rows, self.pooled_position(input_ids)]
        return output

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
    config_class = CLIPMoEConfig
    base_model_prefix = "clip_moe"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPMoEEncoderLayer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range if hasattr(self.config, "initializer_range") else 0.02
        if isinstance(module, Router):
            bound = module.in_features**-0.5  # torch's default for Linear, as in the public code
            nn.init.uniform_(module.weight, -bound, bound)
            if module.balance_bias is not None:
                nn.init.zeros_(module.balance_bias)
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
                return_dict: bool | None = None) -> CLIPMoETowerOutput | tuple:
        """`pixel_values` `[B, C, H, W]`; `output_hidden_states`: see `CLIPMoEEncoder.forward`."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = self.vision_model(pixel_values, output_hidden_states)
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

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, H, W]` -> image features `[B, P]`, not normalised."""
        return self.visual_projection(self.vision_model(pixel_values).pooler_output)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[B, T]` -> text features `[B, P]`, not normalised."""
        return self.text_projection(self.text_model(input_ids, attention_mask).pooler_output)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None,
                output_hidden_states: HiddenStatesWanted = None) -> CLIPMoEOutput:
        """`input_ids` `[B', T]`, `pixel_values` `[B, C, H, W]` -> CLIP's outputs and both towers' balance losses."""
        vision = self.vision_model(pixel_values, output_hidden_states)
        text = self.text_model(input_ids, attention_mask, output_hidden_states)
        image_embeds = F.normalize(self.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = F.normalize(self.text_projection(text.pooler_output), dim=-1)
        logits_per_text = self.logit_scale.exp() * text_embeds @ image_embeds.T
        if self.logit_bias is not None:
            logits_per_text = logits_per_text + self.logit_bias
        return CLIPMoEOutput(
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
            image_balance_loss=vision.balance_loss,
            text_balance_loss=text.balance_loss,
        )
