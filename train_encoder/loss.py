"""Symmetric InfoNCE over the global batch, with features gathered from all ranks and gradients sent back to them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all ranks: each rank's loss depends on every rank's features."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start:start + ctx.rows]


def contrastive_loss(image: Tensor, text: Tensor, valid: Tensor, *, logit_scale: float = 100.0,
                     label_smoothing: float = 0.0, world_size: int = 1) -> Tensor:
    """Symmetric InfoNCE of this rank's rows against the columns of all ranks.

    The mean over ranks of the result, and of the gradients of the parameters, equals what one process computes on
    the whole batch. Only [b, B] logits are held per rank (open_clip's "local loss").

    Args:
        image, text: [b, D] L2-normalised features of this rank; every rank has the same b.
        valid: [b] bool; false rows (unreadable pictures) are neither samples nor negatives.
        logit_scale: factor of the cosines (the default is CLIP's learned scale at its ceiling).
        label_smoothing: share of the target spread evenly over the valid columns.

    Returns:
        Scalar.
    """
    image, text = image.float(), text.float()  # logits of scale 100 need more than half precision
    all_image, all_text, all_valid, start = image, text, valid, 0
    if world_size > 1:
        all_image, all_text = _Gather.apply(image), _Gather.apply(text)
        all_valid = torch.cat(gather(valid.to(torch.uint8))).bool()
        start = dist.get_rank() * len(image)
    targets = torch.arange(start, start + len(image), device=image.device)
    count = all_valid.sum().clamp(min=1)
    total = image.new_zeros(())
    for rows, columns in ((image, all_text), (text, all_image)):
        logits = (logit_scale * rows @ columns.T).masked_fill(~all_valid, float("-inf"))
        # A row that is no sample would have -inf at its own target: give it finite numbers, then weight 0.
        logits = logits.masked_fill(~valid[:, None], 0.0)
        log_p = logits.log_softmax(-1)
        own = log_p.gather(1, targets[:, None])[:, 0]
        spread = log_p.masked_fill(~all_valid, 0.0).sum(-1) / count
        row_loss = -(1 - label_smoothing) * own - label_smoothing * spread
        total = total + (row_loss * valid).sum()
    return total * world_size / (2 * count)


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank, in rank order, without gradient."""
    if not dist.is_initialized():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
