"""Sparse mixture of experts: router, stacked experts, and the losses that keep the routing healthy.

Shapes: N tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Linear):
    """Bias-free linear router, computed in float32 whatever the model's dtype or autocast."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[N, D]` -> router logits `[N, E]`, float32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float())


class Experts(nn.Module):
    """E feed-forward networks with their weights stacked, so that a token's experts cost two grouped products."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, activation: Callable,
                 dropout: float):
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, intermediate_size))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.activation = activation
        self.dropout = dropout

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: `[N, D]`.
            chosen: `[N, K]`, the experts of each token.
            weights: `[N, K]`, their weights.

        Returns:
            `[N, D]`.
        """
        tokens, top_k = chosen.shape
        # One stable sort brings all rows of an expert together: each linear is then E contiguous products.
        order = chosen.flatten().argsort(stable=True)
        expert_of_row = chosen.flatten()[order]
        rows_per_expert = F.one_hot(expert_of_row, self.fc1_weight.shape[0]).sum(0)
        hidden = _grouped_linear(hidden_states[order // top_k], self.fc1_weight, self.fc1_bias, expert_of_row,
                                 rows_per_expert)
        hidden = F.dropout(self.activation(hidden), self.dropout, self.training)
        hidden = _grouped_linear(hidden, self.fc2_weight, self.fc2_bias, expert_of_row, rows_per_expert)
        # Undoing the sort (instead of scattering with atomics) keeps the sum's order, and so the result, fixed.
        hidden = hidden[order.argsort()].view(tokens, top_k, -1)
        return (hidden * weights.to(hidden.dtype).unsqueeze(-1)).sum(1)


class SparseMoE(nn.Module):
    """Top-k MoE in the place of a feed-forward layer: p = softmax(router(x)), the top k renormalised to sum 1."""

    def __init__(self, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int, activation: Callable,
                 dropout: float):
        super().__init__()
        self.top_k = top_k
        self.router = Router(hidden_size, num_experts)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation, dropout)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, D]` -> output `[B, T, D]` and router logits `[B * T, E]` (float32)."""
        tokens = hidden_states.flatten(0, 1)
        router_logits = self.router(tokens)
        # The softmax of the chosen logits is the full softmax renormalised, without the rounding noise of its division:
        # for top-1, whose only weight is 1, that noise would pass for a gradient of the router.
        chosen_logits, chosen = router_logits.topk(self.top_k, dim=-1)
        return self.experts(tokens, chosen, chosen_logits.softmax(-1)).view_as(hidden_states), router_logits


def _grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor, expert_of_row: Tensor,
                    rows_per_expert: Tensor) -> Tensor:
    """`rows` `[R, in]`, sorted by expert, each through its expert's linear (`weight` `[E, out, in]`) -> `[R, out]`."""
    if not hasattr(F, "grouped_mm"):
        return _looped_linear(rows, weight, bias, rows_per_expert)
    if torch.is_autocast_enabled(rows.device.type):  # unlike F.linear, grouped_mm does not heed autocast
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
    if not _grouped_mm_takes(rows, weight):
        return _looped_linear(rows, weight, bias, rows_per_expert)
    offsets = rows_per_expert.cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets) + bias[expert_of_row]


def _looped_linear(rows: Tensor, weight: Tensor, bias: Tensor, rows_per_expert: Tensor) -> Tensor:
    parts = rows.split(rows_per_expert.tolist())
    return torch.cat([F.linear(part, weight[expert], bias[expert]) for expert, part in enumerate(parts)])


def _grouped_mm_takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch has the kernel for this device and dtype; it wants rows that start at multiples of 16 bytes."""
    if rows.device.type == "cuda":
        supported = rows.dtype is torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    else:
        supported = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return supported and all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, token_mask: Tensor | None = None) -> Tensor:
    """Balance loss of a tower over all its MoE layers and tokens at once, as in CLIP-MoE's public code:

    `E * sum_{j<K} sum_e mean[chosen_j == e] * mean[p_e]`; K when perfectly balanced. CuMo's is normalised to 1, taken
    per layer and with top-1 fractions, and the paper's text is a third form: coefficients do not carry over.

    Args:
        router_logits: one `[N, E]` per MoE layer.
        token_mask: `[N]`, true for the tokens that count (default: all, padding too, as in the public code).

    Returns:
        scalar, float32; differentiable through `mean[p_e]` only.
    """
    logits = torch.stack(tuple(router_logits))
    if token_mask is not None:
        logits = logits[:, token_mask.bool()]
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    num_experts = logits.shape[-1]
    fractions = F.one_hot(chosen, num_experts).float().mean((0, 1))
    return num_experts * (fractions * probabilities.mean((0, 1))).sum()


def router_z_loss(router_logits: Sequence[Tensor]) -> Tensor:
    """Mean of `logsumexp(logits)^2` over all MoE layers and tokens (ST-MoE, arXiv 2202.08906, eq. 5). Scalar."""
    return torch.stack(tuple(router_logits)).logsumexp(-1).square().mean()
