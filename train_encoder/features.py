"""Encodes many pictures or captions with a frozen model, spread over the ranks, into one memory-mappable file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from clipmoe_vlm.runs import Distributed, atomic_write, progress

from .data import loader

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK = 128  # samples of one forward


class Items(Dataset):
    """`count` items, each made by `get(number)` inside a worker."""

    def __init__(self, count: int, get: Callable[[int], Any]):
        self.count, self.get = count, get

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.get(number)


def autocast(distributed: Distributed, precision: str) -> torch.autocast:
    """Mixed precision as configured; weights and optimizer state stay in float32."""
    return torch.autocast(distributed.device.type, PRECISIONS[precision], enabled=precision != "fp32")


@torch.no_grad()
def encode(feature: Callable[[Tensor], Tensor], items: Items, collate: Callable, file: Path, *, dim: int,
           distributed: Distributed, workers: int, precision: str, description: str) -> list[str]:
    """Writes the L2-normalised features of all items to `file` ([N, dim] float32 .npy); invalid rows are NaN.

    Ranks take turns at chunks that do not depend on how many ranks there are, so the file does not either. Each
    writes a part of its own (a shared mapping is not safe over a network file system), which the main one joins.

    Args:
        feature: [b, ...] inputs -> [b, dim] features.
        collate: list of items -> (inputs, valid [b], errors).

    Returns:
        The errors of all ranks, in the order of the items.
    """
    rank, world_size = distributed.rank, distributed.world_size
    chunks = [list(range(start, min(start + CHUNK, len(items)))) for start in range(0, len(items), CHUNK)]
    mine = chunks[rank::world_size]
    file.parent.mkdir(parents=True, exist_ok=True)

    def part(of_rank: int) -> Path:
        return file.with_name(f".{file.stem}.{of_rank}")

    errors: list[str] = []
    batches = progress(loader(items, collate, mine, workers), description=description, total=len(mine),
                       enabled=distributed.is_main and len(mine) > 4)
    # Plain writes throughout: a full disk is then an error that can be told, where a mapping would crash.
    with open(part(rank), "wb") as stream:
        for inputs, valid, sentences in batches:
            with autocast(distributed, precision):
                features = feature(inputs.to(distributed.device, non_blocking=True))
            features = F.normalize(features.float(), dim=-1).cpu()
            features[~valid] = float("nan")
            stream.write(features.numpy().tobytes())
            errors += sentences
    gathered: list[Any] = [errors]
    if world_size > 1:
        gathered = [None] * world_size
        torch.distributed.all_gather_object(gathered, errors)  # also waits until every part is written
    if distributed.is_main:
        with atomic_write(file, "wb") as whole, contextlib.ExitStack() as stack:
            parts = [stack.enter_context(open(part(r), "rb")) for r in range(world_size)]
            np.lib.format.write_array_header_1_0(
                whole, {"descr": "<f4", "fortran_order": False, "shape": (len(items), dim)})
            for number, chunk in enumerate(chunks):
                whole.write(parts[number % world_size].read(4 * dim * len(chunk)))
        for r in range(world_size):
            part(r).unlink()
    distributed.barrier()
    return [sentence for sentences in gathered for sentence in sentences]
