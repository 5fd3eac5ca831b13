"""Encodes many pictures or captions with a frozen model, spread over the ranks, into memory-mapped shards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from clipmoe_vlm.loading import loader
from clipmoe_vlm.runs import Distributed, UserError, atomic_write, progress, write_json

from .config import PRECISIONS

CHUNK = 128  # samples of one forward
SHARD = 512 * CHUNK  # samples of one file: what a killed encoding has to do again at most


class Items(Dataset):
    """`count` items, each made by `get(number)` inside a worker."""

    def __init__(self, count: int, get: Callable[[int], Any]):
        self.count, self.get = count, get

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.get(number)


class Features:
    """The features of N samples on the disk, as `encode` wrote them; reading takes no more memory than what is read.

    Args:
        folders: one, or several models' features of the same samples, which are put side by side.

    Raises:
        UserError: a folder holds no features.
    """

    def __init__(self, folders: Sequence[Path]):
        self.parts = []
        for folder in folders:
            files = sorted(folder.glob("[!.]*.npy"))
            if not files:
                raise UserError(f"{folder} holds no features; a later stage needs them, so name another output_dir to "
                                "start anew")
            self.parts.append([np.asarray(np.load(file, mmap_mode="r")) for file in files])

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.parts[0])

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """[n] sample numbers -> [n, D] float32; an unreadable sample's row is NaN."""
        rows = np.empty((len(numbers), sum(shards[0].shape[1] for shards in self.parts)), np.float32)
        first = 0
        for shards in self.parts:
            shard_of, row_of = np.divmod(numbers, len(shards[0]))
            last = first + shards[0].shape[1]
            for shard in np.unique(shard_of):
                here = shard_of == shard
                rows[here, first:last] = shards[shard][row_of[here]]
            first = last
        return rows

    def readable(self) -> np.ndarray:
        """[N] whether each sample could be encoded, by every model."""
        return np.all([np.concatenate([~np.isnan(shard[:, 0]) for shard in shards]) for shards in self.parts], axis=0)


def autocast(distributed: Distributed, precision: str) -> torch.autocast:
    """Mixed precision as configured; weights and optimizer state stay in float32."""
    return torch.autocast(distributed.device.type, PRECISIONS[precision], enabled=precision != "fp32")


@torch.no_grad()
def encode(feature: Callable[[Tensor], Tensor], items: Items, collate: Callable, folder: Path, *, dim: int,
           distributed: Distributed, workers: int, precision: str, description: str,
           dtype: type[np.floating] = np.float32) -> list[str]:
    """Writes the L2-normalised features of all items into `folder`, for `Features`; invalid rows are NaN.

    A shard (`00000.npy`, ...: [SHARD, dim], the last one shorter) appears when it is whole, and one that is there is
    not made again. Ranks take turns at chunks that do not depend on how many ranks there are, so the shards do not
    either. Each writes a part of its own (a shared mapping is not safe over a network file system), which the main
    one joins.

    Args:
        feature: [b, ...] inputs -> [b, dim] features.
        collate: list of items -> (inputs, valid [b], errors).
        dtype: of the files.

    Returns:
        The errors of all items, in their order.

    Raises:
        UserError: a feature of a valid item is not finite.
    """
    rank, world_size = distributed.rank, distributed.world_size
    chunks = {folder / f"{start // SHARD:05}.npy":
              [range(at, min(at + CHUNK, start + SHARD, len(items))) for at in range(start, start + SHARD, CHUNK)
               if at < len(items)]
              for start in range(0, len(items), SHARD)}
    missing = distributed.main_first(lambda: [shard for shard in chunks if not shard.is_file()])
    mine = {shard: chunks[shard][rank::world_size] for shard in missing}
    steps = [chunk for shard in missing for chunk in mine[shard]]
    batches = iter(progress(loader(items, collate, steps, workers), description=description, total=len(steps),
                            enabled=distributed.is_main and len(steps) > 4))
    folder.mkdir(parents=True, exist_ok=True)
    for shard in missing:
        errors: list[tuple[int, str]] = []
        # Plain writes throughout: a full disk is then an error that can be told, where a mapping would crash.
        with open(_part(shard, rank), "wb") as stream:
            for chunk, (inputs, valid, sentences) in zip(mine[shard], batches, strict=False):
                with autocast(distributed, precision):
                    features = feature(inputs.to(distributed.device, non_blocking=True))
                features = F.normalize(features.float(), dim=-1).cpu()
                if not features[valid].isfinite().all():
                    raise UserError(f"{description}: features of the samples {chunk.start} to {chunk.stop - 1} are not "
                                    f"finite; look at the model's weights, or use precision: fp32 (now {precision})")
                features[~valid] = float("nan")
                stream.write(features.numpy().astype(dtype).tobytes())
                errors += [(chunk.start, sentence) for sentence in sentences]
        gathered: list[Any] = [errors]
        if world_size > 1:
            gathered = [None] * world_size
            torch.distributed.all_gather_object(gathered, errors)  # also waits until every part is written
        if distributed.is_main:
            in_order = sorted((error for of_rank in gathered for error in of_rank), key=lambda error: error[0])
            write_json(shard.with_suffix(".json"), [sentence for _, sentence in in_order])
            _join(shard, chunks[shard], world_size, np.dtype(dtype), dim)
    # From the main process, which may be about to remove the files when the others get here.
    return distributed.main_first(lambda: [sentence for shard in chunks
                                           for sentence in json.loads(shard.with_suffix(".json").read_text())])


def _part(shard: Path, rank: int) -> Path:
    return shard.with_name(f".{shard.stem}.{rank}")


def _join(shard: Path, chunks: list[range], world_size: int, dtype: np.dtype, dim: int) -> None:
    """Makes the shard of the ranks' parts, chunk by chunk, and removes them (an interrupted run's, too)."""
    with atomic_write(shard, "wb") as whole, contextlib.ExitStack() as stack:
        parts = [stack.enter_context(open(_part(shard, rank), "rb")) for rank in range(world_size)]
        np.lib.format.write_array_header_1_0(
            whole, {"descr": dtype.str, "fortran_order": False, "shape": (sum(map(len, chunks)), dim)})
        for number, chunk in enumerate(chunks):
            whole.write(parts[number % world_size].read(dtype.itemsize * dim * len(chunk)))
    for leftover in shard.parent.glob(f".{shard.stem}.*"):
        leftover.unlink()
