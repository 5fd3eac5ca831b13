"""Which samples go into which batch: a function of seed and epoch, so that a run can go on at any step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


def modality_length_order(lengths: Sequence[int], batch_size: int, chunks: int,
                          generator: torch.Generator) -> list[int]:
    """Orders samples so that each global batch has one modality and its micro-batches samples of similar length.

    The same order as LLaVA's sampler. The last, incomplete batches of both modalities come last, together.

    Args:
        lengths: words of each sample; negative without a picture.
        batch_size: samples of a micro-batch.
        chunks: micro-batches of a global batch (processes * accumulation steps).
        generator: drawn from.

    Returns:
        all indices; each run of `batch_size * chunks` is a global batch, each run of `batch_size` a micro-batch.
    """
    with_picture = [index for index, length in enumerate(lengths) if length > 0]
    text_only = [index for index, length in enumerate(lengths) if length < 0]
    if not with_picture or not text_only:
        batches = _length_grouped(list(range(len(lengths))), lengths, batch_size, chunks, generator)
        return [index for batch in batches for index in batch]
    grouped = [_length_grouped(part, lengths, batch_size, chunks, generator) for part in (with_picture, text_only)]
    whole = [batch for batches in grouped for batch in batches[:-1]]
    rest = sorted(index for batches in grouped for index in batches[-1])
    whole = [whole[index] for index in torch.randperm(len(whole), generator=generator).tolist()]
    return [index for batch in [*whole, rest] for index in batch]


def _length_grouped(samples: list[int], lengths: Sequence[int], batch_size: int, chunks: int,
                    generator: torch.Generator) -> list[list[int]]:
    """Shuffles `samples` into global batches; sorts each by length and deals it out to its micro-batches."""
    shuffled = [samples[index] for index in torch.randperm(len(samples), generator=generator).tolist()]
    batches = []
    for start in range(0, len(shuffled), batch_size * chunks):
        batch = sorted(shuffled[start : start + batch_size * chunks], key=lambda i: abs(lengths[i]), reverse=True)
        batches.append([index for part in _deal(batch, lengths, chunks) for index in part])
    return batches


def _deal(batch: list[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Equal parts of about equal total length: each sample, longest first, goes to the part that is shortest so far."""
    if len(batch) % chunks:
        return [batch[start::chunks] for start in range(chunks)]
    parts: list[list[int]] = [[] for _ in range(chunks)]
    totals = [0.0] * chunks
    for index in batch:
        part = totals.index(min(totals))
        parts[part].append(index)
        totals[part] += abs(lengths[index])
        if len(parts[part]) == len(batch) // chunks:
            totals[part] = float("inf")
    return parts


@dataclass(frozen=True)
class BatchPlan:
    """The whole run's batches.

    Args:
        lengths: words of each sample, negative without a picture.
        grouped: by modality and length; else in random order.
    """

    lengths: list[int]
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    grouped: bool
    seed: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """The last batch of an epoch may be smaller; it is used."""
        return -(-len(self.lengths) // self.global_batch_size)

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if not self.grouped:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        chunks = self.accumulation_steps * self.world_size
        return modality_length_order(self.lengths, self.micro_batch_size, chunks, generator)

    def micro_batches(self, rank: int, first_step: int, last_step: int) -> Iterator[list[int]]:
        """This rank's micro-batches of steps `first_step` (included) to `last_step` (not), possibly empty ones.

        Every rank gets `accumulation_steps` a step, so that all do the same collective operations.
        """
        size, order, epoch = self.micro_batch_size, [], -1
        for step in range(first_step, last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            start = step % self.steps_per_epoch * self.global_batch_size
            batch = order[start : start + self.global_batch_size]
            for micro in range(self.accumulation_steps):
                chunk = (micro * self.world_size + rank) * size
                yield batch[chunk : chunk + size]
