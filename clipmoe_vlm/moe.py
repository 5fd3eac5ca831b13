"""Sparse mixture of experts: router, stacked experts, and the losses that keep the routing healthy.

Shapes: N tokens, D hidden size, F intermediate size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Older torch has no such function (2.0 and 2.1), and does not compile this model without graph breaks.
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)


class Router(nn.Module):
    """Linear router without a trained bias, computed in float32 whatever the model's dtype or autocast.

    No `nn.Linear`, so that what replaces those by kind (8- and 4-bit loading, peft's "all-linear") leaves it alone.

    Args:
        balance_bias: add a bias per expert to the logits that choose the experts, but not to those that weigh them. No
            gradient trains it: loss-free balancing (arXiv 2408.15664) moves it. The paper adds it to sigmoid scores;
            our scores are logits, in which a shift means the same for every token whatever its other logits.
        base_gate: a linear layer whose sigmoid is the base's share of each token and dimension (see `SparseMoE`).
    """

    def __init__(self, hidden_size: int, num_experts: int, balance_bias: bool = False, base_gate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("balance_bias", torch.empty(num_experts) if balance_bias else None)
        self.base_gate = nn.Linear(hidden_size, hidden_size) if base_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's default for `nn.Linear`, as in the public code; the balance bias is zero."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.balance_bias is not None:
            nn.init.zeros_(self.balance_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[N, D]` -> router logits `[N, E]`, float32, with the balance bias: their top k are the experts."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        return logits if self.balance_bias is None else logits + self.balance_bias.float()


class Experts(nn.Module):
    """E feed-forward networks with their weights stacked: one parameter per layer, whichever experts are in use."""

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
        grouped = _has_grouped_mm(hidden_states, self.fc1_weight)
        if _is_compiling() and not grouped:
            return self._dense(hidden_states, chosen, weights)
        tokens, top_k = chosen.shape
        # One stable sort brings all rows of an expert together. Rows only ever change places (here, and when the sort
        # is undone, instead of scattering with atomics): sums keep their order, and so results stay the same.
        order = chosen.flatten().argsort(stable=True)
        rows = hidden_states.repeat_interleave(top_k, 0).index_select(0, order)
        expert_of_row = F.one_hot(chosen.flatten()[order], self.fc1_weight.shape[0])
        outputs = (self._grouped if grouped else self._looped)(rows, expert_of_row)
        outputs = outputs.index_select(0, order.argsort()).view(tokens, top_k, -1)
        return (outputs * weights.to(outputs.dtype).unsqueeze(-1)).sum(1)

    def _hidden(self, rows: Tensor) -> Tensor:
        return F.dropout(self.activation(rows), self.dropout, self.training)

    def _grouped(self, rows: Tensor, expert_of_row: Tensor) -> Tensor:
        """`rows` `[R, D]` sorted by expert, `expert_of_row` `[R, E]` one-hot -> `[R, D]`; never waits for the GPU."""
        parameters = [self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        if torch.is_autocast_enabled(rows.device.type):  # unlike F.linear, grouped_mm does not heed autocast
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, *parameters = (tensor.to(dtype) for tensor in (rows, *parameters))
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
        ends = expert_of_row.sum(0).cumsum(0).to(torch.int32)
        # Biases as a product with one-hot rows: their gradient is then a product, where indexing would scatter.
        one_hot = expert_of_row.to(rows.dtype)
        hidden = F.grouped_mm(rows, fc1_weight.transpose(1, 2), offs=ends).addmm_(one_hot, fc1_bias)
        return F.grouped_mm(self._hidden(hidden), fc2_weight.transpose(1, 2), offs=ends).addmm_(one_hot, fc2_bias)

    def _looped(self, rows: Tensor, expert_of_row: Tensor) -> Tensor:
        """The same, one expert after the other: on a CPU the faster way, since its hidden layer stays in the cache."""
        # unbind, not weight[e]: its backward stacks the gradients once, where each index would fill a whole stack.
        experts = zip(rows.split(expert_of_row.sum(0).tolist()), self.fc1_weight.unbind(), self.fc1_bias.unbind(),
                      self.fc2_weight.unbind(), self.fc2_bias.unbind(), strict=True)
        return torch.cat([F.linear(self._hidden(F.linear(part, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
                          for part, fc1_weight, fc1_bias, fc2_weight, fc2_bias in experts])

    def _dense(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As `forward`, every expert on every token: E / K times the work, but no shape that depends on the routing,
        as torch.compile needs for one whole graph where there is no grouped product."""
        shares = weights.new_zeros(len(chosen), len(self.fc1_weight)).scatter(1, chosen, weights)
        output = torch.zeros_like(hidden_states)
        for expert, share in enumerate(shares.to(hidden_states.dtype).unbind(1)):
            hidden = self._hidden(F.linear(hidden_states, self.fc1_weight[expert], self.fc1_bias[expert]))
            output = output + share[:, None] * F.linear(hidden, self.fc2_weight[expert], self.fc2_bias[expert])
        return output


class SparseMoE(nn.Module):
    """Top-k MoE in the place of a feed-forward layer: p = softmax(router(x)), the top k renormalised to sum 1.

    With a base gate, `g(x) * FFN_0(x) + (1 - g(x)) * mixture(x)` with `g(x) = sigmoid(W x + b)` per token and
    dimension: the fusion gate of CLIP-FMoE (ICLR 2026). Expert 0, the base, stays in the mixture, so that g = 0 is the
    layer without a gate.
    """

    def __init__(self, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int, activation: Callable,
                 dropout: float, balance_bias: bool = False, base_gate: bool = False):
        super().__init__()
        self.top_k = top_k
        self.router = Router(hidden_size, num_experts, balance_bias, base_gate)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation, dropout)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, D]` -> output `[B, T, D]` and router logits `[B * T, E]` (float32)."""
        tokens = hidden_states.flatten(0, 1)
        router_logits = self.router(tokens)
        # The softmax of the chosen logits is the full softmax renormalised, without the rounding noise of its division:
        # for top-1, whose only weight is 1, that noise would pass for a gradient of the router.
        chosen_logits, chosen = router_logits.topk(self.top_k, dim=-1)
        if self.router.balance_bias is not None:
            chosen_logits = chosen_logits - self.router.balance_bias.float()[chosen]
        output = self.experts(tokens, chosen, chosen_logits.softmax(-1))
        if self.router.base_gate is not None:
            base = self.experts(tokens, torch.zeros_like(chosen[:, :1]), torch.ones_like(chosen_logits[:, :1]))
            output = output + self.router.base_gate(tokens).sigmoid() * (base - output)
        return output.view_as(hidden_states), router_logits


def _has_grouped_mm(tokens: Tensor, weight: Tensor) -> bool:
    """Whether torch has the kernel for this GPU and dtype; it wants rows that start at multiples of 16 bytes."""
    if not hasattr(F, "grouped_mm") or tokens.device.type != "cuda":
        return False
    autocast = torch.is_autocast_enabled(tokens.device.type)
    dtype = torch.get_autocast_dtype(tokens.device.type) if autocast else tokens.dtype
    return (dtype is torch.bfloat16 and torch.cuda.get_device_capability(tokens.device) >= (8, 0)
            and all(size * dtype.itemsize % 16 == 0 for size in weight.shape[1:]))


def routers_train(module: nn.Module) -> bool:
    """Whether a router somewhere inside gets gradients."""
    return any(part.weight.requires_grad for part in module.modules() if isinstance(part, Router))


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
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    num_experts = logits.shape[-1]
    fractions = F.one_hot(chosen, num_experts).float()
    if token_mask is None:
        return num_experts * (fractions.mean((0, 1)) * probabilities.mean((0, 1))).sum()
    # Weights instead of indexing by the mask, whose shape would depend on the data (a wait for the GPU).
    share = token_mask.float() / (len(logits) * token_mask.sum())
    fractions = torch.einsum("n,lnke->ke", share, fractions)
    return num_experts * (fractions * torch.einsum("n,lne->e", share, probabilities)).sum()


def router_z_loss(router_logits: Sequence[Tensor], token_mask: Tensor | None = None) -> Tensor:
    """Mean of `logsumexp(logits)^2` over all MoE layers and tokens (ST-MoE, arXiv 2202.08906, eq. 5). Scalar.

    Args as for `load_balancing_loss`.
    """
    squares = torch.stack(tuple(router_logits)).logsumexp(-1).square()
    if token_mask is None:
        return squares.mean()
    return (squares * token_mask).sum() / (len(squares) * token_mask.sum())
