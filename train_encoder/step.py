"""Loss and gradients of one global batch, in one forward or, where that does not fit, in micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.runs import set_seed, stage_seed

from .loss import routing_of_samples


def step_gradients(model: CLIPMoEModel, batch: dict, loss_of: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]],
                   *, micro_batch_size: int | None, seed: int, amp: torch.autocast,
                   scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """Adds the (scaled) gradients of this rank's loss to the parameters that train, and returns its losses.

    The loss needs the features of all samples at once, the towers do not. With micro-batches this is GradCache (arXiv
    2101.06983): encode them without a graph, take the loss and its gradient with respect to what was encoded, then
    encode each again, with its graph, and send its part of that gradient through. Everything that the loss depends on
    is a row per sample (`encode_samples`), so the result is that of all graphs held at once, the balance loss included.

    Args:
        batch: this rank's share: tensors of b rows, among them `valid` [b].
        loss_of: (rows of b samples, valid) -> losses, of which `loss` is differentiated (see `loss.total_loss`).
        micro_batch_size: samples of one forward; None: all b.
        seed: dropout of the n-th micro-batch follows from (seed, n), in both of its forwards.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    share = len(batch["valid"])
    size = micro_batch_size or share
    parts = [slice(start, start + size) for start in range(0, share, size)]
    cached = len(parts) > 1

    def encode(number: int) -> dict[str, Tensor]:
        set_seed(stage_seed(seed, number))
        with amp:
            return encode_samples(model, {name: value[parts[number]].to(model.device, non_blocking=True)
                                          for name, value in tensors.items()})

    with torch.set_grad_enabled(not cached):
        encoded = [encode(number) for number in range(len(parts))]
    rows = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
    if cached:
        rows = {name: value.requires_grad_() for name, value in rows.items()}
    losses = loss_of(rows, tensors["valid"].to(model.device))
    scaler.scale(losses["loss"]).backward()
    if cached:
        for number, part in enumerate(parts):
            pairs = [(value, rows[name].grad[part]) for name, value in encode(number).items()
                     if value.requires_grad and rows[name].grad is not None]
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    return {name: value.detach() for name, value in losses.items()}


@torch.no_grad()
def encode_by_base(base: CLIPMoEModel, batch: dict, *, micro_batch_size: int | None,
                   amp: torch.autocast) -> dict[str, Tensor]:
    """`image` and `text` [b, D], L2-normalised, of this rank's share by the dense base, for `loss.total_loss`."""
    size = micro_batch_size or len(batch["valid"])
    parts = zip(batch["pixel_values"].split(size), batch["input_ids"].split(size), strict=True)
    with amp:
        outputs = [base(pixel_values=pixels.to(base.device), input_ids=ids.to(base.device)) for pixels, ids in parts]
    return {"image": torch.cat([output.image_embeds for output in outputs]),
            "text": torch.cat([output.text_embeds for output in outputs])}


def encode_samples(model: CLIPMoEModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the loss needs to know of b samples, a row each.

    Args:
        inputs: `pixel_values` [b, 3, H, W], `input_ids` [b, T] and, for Long-CLIP's loss, `short_input_ids` [b, T].

    Returns:
        `image`, `text`, `short_text` [b, D], L2-normalised; for each tower with experts, under `image_` and `text_`,
        what `routing_of_samples` returns.
    """
    output = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    rows = {"image": output.image_embeds, "text": output.text_embeds}
    if "short_input_ids" in inputs:  # their routing is left out of the balance loss
        rows["short_text"] = F.normalize(model.get_text_features(inputs["short_input_ids"]), dim=-1)
    for name, tower, config in (("image", output.vision_model_output, model.config.vision_config),
                                ("text", output.text_model_output, model.config.text_config)):
        if tower.router_logits:
            routing = routing_of_samples(tower.router_logits, config.num_experts_per_tok, len(output.image_embeds))
            rows |= {f"{name}_{key}": value for key, value in routing.items()}
    return rows
