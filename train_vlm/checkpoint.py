"""Checkpoints to resume from, which no ZeRO stage and no number of processes is tied to.

`checkpoints/step_N/` holds safetensors files, a few from each process. A process writes what it holds of each trained
parameter: the weight in float32 and AdamW's two moments, as pieces `KIND/START/NAME` where START is the place of the
piece's first element in the flattened parameter. On resuming each process reads the ranges that it holds then. So
nothing is gathered, and no process needs memory for more than its own part and one file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipmoe_vlm.runs import Distributed, UserError, atomic_write
from train_vlm.engine import told_once

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2**30


@dataclass(frozen=True)
class Piece:
    """What this process holds of a trained parameter: elements `start` to `start + size` of it, flattened.

    `owner` is the float32 tensor that AdamW updates; the piece begins at its element `offset`.
    """

    name: str
    start: int
    size: int
    owner: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of the owner, or of one of its moments: `[size]`, a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


def pieces(engine: Any) -> list[Piece]:
    """Where DeepSpeed keeps the trained parameters on this process."""
    optimizer, stage, found = engine.optimizer, engine.zero_optimization_stage(), []
    masters = {}  # of stage 0: bf16 weights have a copy in float32
    if not stage and hasattr(optimizer, "fp32_groups"):
        masters = dict(zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True))
    for name, parameter in engine.module.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 3:
            group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = share * torch.distributed.get_rank()
            size = min(share, parameter.ds_numel - start)  # the last share is padded
            found.append(Piece(name, start, size, optimizer.fp32_partitioned_groups_flat[group], offset))
        elif stage:
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                owner = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                found.append(Piece(name, inside.start, inside.numel, owner, here.start))
        else:
            found.append(Piece(name, 0, parameter.numel(), masters.get(parameter, parameter), 0))
    return [piece for piece in found if piece.size > 0]


def moments(engine: Any, owner: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor, begun here if it has made no update yet."""
    state = engine.basic_optimizer.state[owner]
    if not state:
        state["step"] = torch.zeros((), device=owner.device)  # where the fused AdamW wants it
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(owner, requires_grad=False)
    return state


# --- writing -------------------------------------------------------------------------------------------------------


def save_checkpoint(engine: Any, folder: Path, step: int, processes: Distributed) -> None:
    """Writes what training needs to go on after update `step`; every process calls it.

    The marker `latest` is replaced, in one go, only when all processes have written their parts, and only then does
    the previous checkpoint go: a run killed at any moment finds a whole one. Frozen weights are not stored.

    Raises:
        UserError: a part can't be written (the disk is full); the previous checkpoint is intact.
    """
    target = folder / f"step_{step}"
    if processes.is_main:
        shutil.rmtree(target, ignore_errors=True)  # of a killed run, perhaps of other processes
    processes.barrier()
    try:
        with told_once(processes):
            # Without ZeRO all processes hold the same.
            if processes.is_main or engine.zero_optimization_stage():
                write_pieces(engine, target, processes.rank)
    except UserError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    if processes.is_main:
        with atomic_write(folder / "latest") as stream:
            stream.write(target.name)
        for old in folder.glob("step_*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    processes.barrier()


def write_pieces(engine: Any, folder: Path, rank: int) -> None:
    """Writes this process's pieces, in files of about `FILE_BYTES` so that those of a GPU pass through little memory.

    Raises:
        UserError: a file can't be written.
    """
    tensors: dict[str, Tensor] = {}
    number = 0
    for piece in (held := pieces(engine)):
        state = moments(engine, piece.owner)
        for kind, tensor in ((WEIGHT, piece.owner), *((kind, state[kind]) for kind in MOMENTS)):
            tensors[f"{kind}/{piece.start}/{piece.name}"] = piece.of(tensor).cpu()
        if piece is held[-1] or sum(tensor.nbytes for tensor in tensors.values()) > FILE_BYTES:
            file = folder / f"{rank:05}_{number:05}.safetensors"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, file)
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
            except (OSError, SafetensorError) as error:
                raise UserError(f"{folder} could not be written ({str(error).splitlines()[0]}); free some space and "
                                "run the same command again: it goes on from the previous checkpoint") from error
            tensors, number = {}, number + 1


# --- reading -------------------------------------------------------------------------------------------------------


def load_checkpoint(engine: Any, folder: Path, processes: Distributed) -> int:
    """Restores the last whole checkpoint; returns the number of updates it has seen, 0 if there is none.

    Raises:
        UserError: a file is missing, damaged, or of another model.
    """
    latest = folder / "latest"
    name = processes.main_first(lambda: latest.read_text(encoding="utf-8").strip() if latest.is_file() else "")
    if not name:
        return 0
    step = int(name.removeprefix("step_"))
    with told_once(processes), contextlib.ExitStack() as files, torch.no_grad():
        stored = Stored(folder / name, files)
        stored.check({name: parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
                      for name, parameter in engine.module.model.named_parameters() if parameter.requires_grad})
        for piece in pieces(engine):
            state = moments(engine, piece.owner)
            state["step"].fill_(step)
            for kind, tensor in ((WEIGHT, piece.owner), *((kind, state[kind]) for kind in MOMENTS)):
                stored.read(kind, piece, piece.of(tensor))
    refresh_weights(engine)
    return step


class Stored:
    """The pieces in a checkpoint's files, whoever wrote them."""

    def __init__(self, folder: Path, files: contextlib.ExitStack):
        self.folder = folder
        self.pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}  # by kind and name: start, and where to read
        with self.readable():
            for path in sorted(folder.glob("*.safetensors")):
                file = files.enter_context(safe_open(path, "pt"))
                for key in file.keys():
                    kind, start, name = key.split("/", 2)
                    self.pieces.setdefault((kind, name), []).append((int(start), file.get_slice(key)))

    def check(self, sizes: dict[str, int]) -> None:
        """Raises UserError unless each trained parameter, of `sizes` elements, is there as a whole and no other is."""
        found = {key: sum(piece.get_shape()[0] for _, piece in places) for key, places in self.pieces.items()}
        wanted = {(kind, name): size for kind in (WEIGHT, *MOMENTS) for name, size in sizes.items()}
        wrong = sorted(key for key in {*found, *wanted} if found.get(key, 0) != wanted.get(key, 0))
        if wrong:
            raise UserError(f"{self.folder} lacks a file, or is a checkpoint of another model ({len(wrong)} "
                            f"differences; the first: {' of '.join(wrong[0])} has {found.get(wrong[0], 0)} numbers "
                            f"there and {wanted.get(wrong[0], 0)} here); remove {self.folder.parent} to start anew")

    def read(self, kind: str, piece: Piece, target: Tensor) -> None:
        """Fills `target` `[piece.size]` with the numbers `piece.start` and on."""
        with self.readable():
            for start, source in self.pieces[kind, piece.name]:
                first, last = max(start, piece.start), min(start + source.get_shape()[0], piece.start + piece.size)
                if first < last:
                    target[first - piece.start:last - piece.start] = source[first - start:last - start]

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder} can't be read ({error}); remove {self.folder.parent} to start this run "
                            "anew") from error


def refresh_weights(engine: Any) -> None:
    """Gives the model the optimizer's weights, rounded to its precision; every process calls it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # small parameters lie whole on every process: part them, ...
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # ... and gather them again
    elif stage:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for weight, master in zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True):
            weight.data.copy_(master)


def remove_checkpoints(folder: Path) -> None:
    """Called when the finished model is on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
