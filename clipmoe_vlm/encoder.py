"""What both towers of CLIP-MoE are made of: transformer blocks, dense or with a mixture of experts, and their output.

Shapes: B batch, T tokens, D hidden size, E experts, H heads of d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from .configuration_clipmoe import _TowerConfig
from .moe import SparseMoE, load_balancing_loss, router_z_loss, routers_train

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


def attention(config: _TowerConfig, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """Heads `[B, H, T, d]` -> `[B, H, T, d]`; see `CLIPMoEPreTrainedModel` for which implementation is used when."""
    if config._attn_implementation_internal != "eager":
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


class CLIPMoEAttention(nn.Module):
    def __init__(self, config: _TowerConfig):
        super().__init__()
        self.config = config
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
        attended = attention(self.config, query, key, value, self.is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CLIPMoEMLP(nn.Module):
    def __init__(self, config: _TowerConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.activation]
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
                ACT2FN[config.activation], config.expert_dropout, config.balance_bias, config.base_gate,
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
            token_mask: `[B, T]`, the tokens that count in the balance loss and the z-loss (default: all).
        """
        depth = len(self.layers)
        wanted = wanted_hidden_states(output_hidden_states, depth)
        blocks = depth if wanted is None or isinstance(output_hidden_states, bool) else max(wanted)
        kept: list[Tensor | None] = [None] * (depth + 1)
        kept[0] = hidden_states
        router_logits = []
        for index, layer in enumerate(self.layers[:blocks], start=1):
            hidden_states, logits = self._run(layer, hidden_states)
            if wanted is not None and index in wanted:
                kept[index] = hidden_states
            if logits is not None:
                router_logits.append(logits)
        balance_loss = aux_loss = hidden_states.new_zeros((), dtype=torch.float32)
        if router_logits:
            mask = None if token_mask is None else token_mask.flatten()
            balance_loss = load_balancing_loss(router_logits, self.config.num_experts_per_tok, mask)
            if routers_train(self):
                aux_loss = balance_loss
                if self.config.router_z_loss_coef:
                    aux_loss = aux_loss + self.config.router_z_loss_coef * router_z_loss(router_logits, mask)
        return CLIPMoETowerOutput(
            last_hidden_state=hidden_states,
            hidden_states=None if wanted is None else tuple(kept),
            router_logits=tuple(router_logits),
            aux_loss=aux_loss,
            balance_loss=balance_loss,
        )

    def _run(self, layer: CLIPMoEEncoderLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer, under gradient checkpointing if that is on and the layer is part of the backward."""
        if not self.gradient_checkpointing or not torch.is_grad_enabled():
            return layer(hidden_states)
        if not hidden_states.requires_grad:
            if not any(parameter.requires_grad for parameter in layer.parameters()):
                return layer(hidden_states)
            # A reentrant checkpoint gives its weights gradients only if an input wants one, too.
            hidden_states = hidden_states.detach().requires_grad_()
        return self._gradient_checkpointing_func(layer.__call__, hidden_states)


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
