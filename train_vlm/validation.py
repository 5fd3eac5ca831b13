"""The loss on held-out samples."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from clipmoe_vlm.loading import loader
from train_vlm.data import Collator, ConversationDataset
from train_vlm.engine import stop, summed, to_device
from train_vlm.samples import Samples

if TYPE_CHECKING:
    from train_vlm.train import Run


def validation_loss(run: Run, dataset: ConversationDataset, collate: Collator) -> dict[str, float]:
    """Mean cross-entropy of all label tokens of `dataset`, in nats; every process calls it, in evaluation mode.

    The micro-batches are the same for any number of processes, and so is their sum.

    Raises:
        UserError: no sample can be used.
    """
    rank, world_size, size = run.processes.rank, run.processes.world_size, run.config.micro_batch_size
    started = time.perf_counter()
    lengths = dataset.samples.lengths
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    batches = [order[start:start + size] for start in range(0, len(order), size)]
    batches += [[]] * (-len(batches) % world_size)  # processes that share parameters (ZeRO-3) do the same work
    sums = torch.zeros(len(batches), 4, dtype=torch.float64)
    for row, batch in zip(sums[rank::world_size],
                          loader(dataset, collate, batches[rank::world_size], run.config.workers), strict=True):
        loss_sum, *_ = run.engine(**to_device(batch["inputs"], run.processes.device))
        counts = batch["counts"]
        row[:] = torch.tensor([loss_sum, counts["label_tokens"], counts["samples"], counts["skipped"]])
    loss, label_tokens, samples, skipped = map(math.fsum, zip(*summed(sums, run.processes), strict=True))
    if not label_tokens:
        stop(run.processes, f"validation_data: {run.config.validation_data}: none of its samples can be used")
    return {"validation_loss": loss / label_tokens, "validation_label_tokens": int(label_tokens),
            "validation_samples": int(samples), "validation_skipped": int(skipped),
            "validation_seconds": round(time.perf_counter() - started, 3)}


def shared_samples(held_out: Samples, trained_on: Samples) -> int:
    """How many of the held-out samples have the words and the pictures of one that is trained on."""
    return int(np.isin(held_out.contents, trained_on.contents).sum())
