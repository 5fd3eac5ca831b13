"""Which samples go into which batch: a function of seed and epoch, so that a run can go on at any step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from clipmoe_vlm.runs import stage_seed


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
        weights: of each source, in the order of `lengths`, its number of samples and how often each of them comes in an
            epoch. Of weight 2.3 all come twice, and 30% of them, which each epoch draws anew, a third time.
            By default every sample comes once.
    """

    lengths: list[int]
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    grouped: bool
    seed: int
    weights: Sequence[tuple[int, float]] = ()

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @property
    def _sources(self) -> Sequence[tuple[int, float]]:
        return self.weights or [(len(self.lengths), 1)]

    @property
    def samples_per_epoch(self) -> int:
        return sum(round(count * weight) for count, weight in self._sources)

    @property
    def steps_per_epoch(self) -> int:
        """The last batch of an epoch may be smaller; it is used."""
        return -(-self.samples_per_epoch // self.global_batch_size)

    def order(self, epoch: int) -> list[int]:
        drawn = self._drawn(epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.grouped:
            chunks = self.accumulation_steps * self.world_size
            lengths = [self.lengths[index] for index in drawn]
            order = modality_length_order(lengths, self.micro_batch_size, chunks, generator)
        else:
            order = torch.randperm(len(drawn), generator=generator).tolist()
        return [drawn[place] for place in order]

    def _drawn(self, epoch: int) -> list[int]:
        """The samples of an epoch, in the order of the sources; all of them once if every weight is 1."""
        drawn: list[int] = []
        first = 0
        for number, (count, weight) in enumerate(self._sources):
            whole, rest = divmod(round(count * weight), count)
            generator = torch.Generator().manual_seed(stage_seed("source", self.seed, epoch, number))
            part = torch.randperm(count, generator=generator)[:rest].sort().values + first
            drawn += [*range(first, first + count)] * whole + part.tolist()
            first += count
        return drawn

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
