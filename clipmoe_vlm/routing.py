"""What the routers did: load, entropy, and a map of which expert took which patch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_load(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Share of the routed (token, expert) pairs that each expert took.

    Args:
        router_logits: one `[N, E]` per MoE layer.

    Returns:
        `[layers, E]`; rows sum to 1.
    """
    logits = torch.stack(tuple(router_logits))
    return F.one_hot(logits.topk(top_k, dim=-1).indices, logits.shape[-1]).float().mean((1, 2))


def router_entropy(router_logits: Sequence[Tensor]) -> Tensor:
    """Mean entropy, in nats, of the routers' softmax: 0 is certain, log(E) undecided. Returns `[layers]`."""
    log_p = torch.stack(tuple(router_logits)).float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean(-1)


def routing_map(router_logits: Tensor, batch_size: int, grid: tuple[int, int]) -> Tensor:
    """First choice of every patch in one layer.

    Args:
        router_logits: `[B * T, E]` of that layer, T = 1 + rows * columns (the class token comes first and is dropped).
        grid: rows and columns of patches.

    Returns:
        `[B, rows, columns]`, indices of experts.
    """
    first = router_logits.argmax(-1).view(batch_size, -1)
    return first[:, first.shape[1] - grid[0] * grid[1]:].view(batch_size, *grid)
