"""What the routers did: load, entropy, how far they moved, and a map of which expert took which patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .modeling_clipmoe import CLIPMoEModel


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


def router_movement(routers: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """How far each router is from where it started: `||w - w0|| / ||w0||` (Frobenius norms). Returns `[layers]`."""
    return torch.stack([(w.float() - w0.float()).norm() / w0.float().norm()
                        for w, w0 in zip(routers, start, strict=True)])


@torch.no_grad()
def routing_statistics(model: CLIPMoEModel, pixel_values: Tensor, input_ids: Tensor) -> dict[str, list]:
    """Load and entropy per MoE layer of both towers over some pictures and captions, as plain lists.

    Args:
        pixel_values: `[B, C, H, W]`.
        input_ids: `[B', T]`, padded on the right. Padding, whose routing says nothing, is left out.

    Returns:
        `vision_load`, `text_load` `[layers, E]` and `vision_entropy`, `text_entropy` `[layers]`.
    """
    real = model.text_model.token_mask(input_ids).flatten()
    result = {}
    for name, tower, inputs, keep in (("vision", model.vision_model, pixel_values, slice(None)),
                                      ("text", model.text_model, input_ids, real)):
        logits = [layer[keep] for layer in tower(inputs).router_logits]
        result[f"{name}_load"] = expert_load(logits, tower.config.num_experts_per_tok).tolist()
        result[f"{name}_entropy"] = router_entropy(logits).tolist()
    return result


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
