"""What training minimises, over the global batch: features are gathered from all ranks and gradients sent back to them.

Each function gives this rank's part: its mean over ranks, and that of the parameters' gradients, is what one process
computes on the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

LONG_CLIP_COMPONENTS = 32


def total_loss(rows: dict[str, Tensor], valid: Tensor, *, logit_scale: float, label_smoothing: float,
               balance_coef: float, z_loss_coef: float, world_size: int, balance_by_loss: bool = True,
               base: dict[str, Tensor] | None = None, distillation: float = 0.0) -> dict[str, Tensor]:
    """The loss of a step and its terms, from a row per sample (`step.encode_samples`).

    `loss` = contrastive + short + distillation * `distillation_loss` + balance_coef * (image + text / 2), where a
    tower's term is its balance loss + z_loss_coef * its router z-loss. `short` is Long-CLIP's second term (arXiv
    2403.15378, weight 1 as in its newest code): short captions against pictures reduced to their principal components.

    Args:
        valid: [b] bool; see `contrastive_loss`.
        balance_by_loss: false: the balance losses are measured, but not in `loss`.
        base: `image` and `text` [b, D] of the dense base; None: no distillation.

    Returns:
        Scalars: `loss`, `contrastive`, `image_balance`, `text_balance` (zero in a dense tower) and, with short
        captions, `short`; with `base`, `distillation`.
    """
    world = {"world_size": world_size}
    contrastive = {"logit_scale": logit_scale, "label_smoothing": label_smoothing, **world}
    losses = {"contrastive": contrastive_loss(rows["image"], rows["text"], valid, **contrastive)}
    if "short_text" in rows:
        coarse = principal_components(rows["image"].float(), valid, LONG_CLIP_COMPONENTS, **world)
        losses["short"] = contrastive_loss(coarse, rows["short_text"], valid, **contrastive)
    loss = sum(losses.values())
    if base is not None:
        losses["distillation"] = distillation_loss(rows["image"], rows["text"], base["image"], base["text"], valid,
                                                   logit_scale=logit_scale, **world)
        loss = loss + distillation * losses["distillation"]
    for tower, weight in (("image", 1.0), ("text", 0.5)):
        losses[f"{tower}_balance"] = loss.new_zeros(())
        if f"{tower}_probabilities" in rows:
            balance = balance_loss(rows[f"{tower}_chosen"], rows[f"{tower}_probabilities"], **world)
            losses[f"{tower}_balance"] = balance
            z_loss = z_loss_coef * rows[f"{tower}_z"].mean()
            loss = loss + balance_coef * weight * (balance + z_loss if balance_by_loss else z_loss)
    return {"loss": loss, **losses}


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

    Only [b, B] logits are held per rank (open_clip's "local loss").

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


def distillation_loss(image: Tensor, text: Tensor, base_image: Tensor, base_text: Tensor, valid: Tensor, *,
                      logit_scale: float = 100.0, world_size: int = 1) -> Tensor:
    """How far the in-batch matches have moved from the base's where the base is right.

    For each picture the Kullback-Leibler divergence KL(base || model) of the softmaxes over the captions of the global
    batch (and the other way round), as ZSCL (arXiv 2303.06628) keeps zero-shot skills; ours is that only the rows
    count in which the base puts the own caption (picture) first, so that nothing holds on to its mistakes. The mean is
    over all valid rows. Features, ranks, and the meaning of the mean over ranks are those of `contrastive_loss`.

    Args:
        base_image, base_text: [b, D'] L2-normalised features of the base for the same samples, without gradient.

    Returns:
        Scalar.
    """
    image, text, base_image, base_text = (features.float() for features in (image, text, base_image, base_text))
    all_image, all_text, all_base_image, all_base_text = image, text, base_image, base_text
    all_valid, start = valid, 0
    if world_size > 1:
        all_image, all_text = _Gather.apply(image), _Gather.apply(text)
        all_base_image, all_base_text = torch.cat(gather(base_image)), torch.cat(gather(base_text))
        all_valid = torch.cat(gather(valid.to(torch.uint8))).bool()
        start = dist.get_rank() * len(image)
    targets = torch.arange(start, start + len(image), device=image.device)
    total = image.new_zeros(())
    for rows, columns, base_rows, base_columns in ((image, all_text, base_image, all_base_text),
                                                   (text, all_image, base_text, all_base_image)):
        # A finite stand-in for minus infinity: 0 * (-inf) in the divergence would be NaN.
        log_p, log_q = ((logit_scale * one @ others.T).masked_fill(~all_valid, -1e9).log_softmax(-1)
                        for one, others in ((base_rows, base_columns), (rows, columns)))
        right = valid & (log_p.argmax(-1) == targets)
        total = total + ((log_p.exp() * (log_p - log_q)).sum(-1) * right).sum()
    return total * world_size / (2 * all_valid.sum().clamp(min=1))


def principal_components(features: Tensor, valid: Tensor, count: int, *, world_size: int = 1) -> Tensor:
    """This rank's features, rebuilt from the first `count` principal components of the global batch.

    Long-CLIP takes the components per rank; the global batch's do not depend on the number of processes. The gradient
    is the exact one, as through an SVD. But an SVD's backward also divides by the gaps between the kept components,
    which cancel in the result yet blow up rounding errors when two are alike; here only gaps to the others are used.

    Args:
        features: [b, D]; every rank has the same b.
        valid: [b] bool; false rows do not shape the components.

    Returns:
        [b, D].
    """
    if count >= features.shape[1]:
        return features
    everything, everything_valid = features, valid
    if world_size > 1:
        everything = _Gather.apply(features)
        everything_valid = torch.cat(gather(valid.to(torch.uint8))).bool()
    used = everything_valid[:, None].to(features.dtype)
    mean = (everything * used).sum(0) / used.sum().clamp(min=1)
    centred = (everything - mean) * used
    covariance = centred.T @ centred
    # Ascending. Where features are not finite the loss says so below; the decomposition would raise.
    values, vectors = torch.linalg.eigh(covariance.detach().nan_to_num(0.0, 0.0, 0.0))
    (small, large), (others, kept) = values.tensor_split([-count]), vectors.tensor_split([-count], dim=1)
    # First-order perturbation: how a change of the covariance, zero in value, tilts the kept vectors to the others.
    gaps = (large - small[:, None]).clamp(min=values[-1].clamp(min=1e-12) * 1e-6)
    kept = kept + others @ (others.T @ (covariance - covariance.detach()) @ kept / gaps)
    return mean + (features - mean) @ kept @ kept.T


def routing_of_samples(router_logits: Sequence[Tensor], top_k: int, samples: int) -> dict[str, Tensor]:
    """Each sample's mean routing, over its tokens (padding included).

    Args:
        router_logits: one [samples * T, E] per MoE layer; L layers.

    Returns:
        `chosen` [samples, L, E]: choices of each expert per token, which sum to top_k; `probabilities`
        [samples, L, E]; `z` [samples]: mean of logsumexp(logits)^2, over the layers too.
    """
    logits = torch.stack(tuple(router_logits), 1).unflatten(0, (samples, -1))  # [samples, T, L, E]
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(top_k, dim=-1).indices, 1.0)
    return {"chosen": chosen.mean(1), "probabilities": logits.softmax(-1).mean(1),
            "z": logits.logsumexp(-1).square().mean((1, 2))}


def balance_loss(chosen: Tensor, probabilities: Tensor, *, world_size: int = 1) -> Tensor:
    """`clipmoe_vlm.moe.load_balancing_loss` of the global batch, from each sample's mean routing.

    The public code takes it per rank, so that its value depends on the number of processes; the global one costs a sum
    of E numbers. Only probabilities carry a gradient, and the loss is linear in them.

    Args:
        chosen, probabilities: [b, L, E] of this rank, see `routing_of_samples`; every rank has the same b.
    """
    fractions = chosen.detach().mean((0, 1))
    if world_size > 1:
        dist.all_reduce(fractions)
        fractions /= world_size
    return probabilities.shape[-1] * (fractions * probabilities.mean((0, 1))).sum()


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank, in rank order, without gradient."""
    if not dist.is_initialized():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
