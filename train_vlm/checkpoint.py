"""Checkpoints to resume from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import Distributed, UserError, atomic_write


def save_checkpoint(engine: Any, folder: Path, step: int, state: dict[str, Any], processes: Distributed) -> None:
    """Writes what training needs to go on from `step`; every process calls it.

    The marker `latest` is replaced, in one go, only when all processes have written their parts, and only then does
    the previous checkpoint go: a run killed at any moment finds a whole one. Frozen weights are not stored.

    Raises:
        UserError: the disk is full; the previous checkpoint is intact.
    """
    tag = f"step_{step}"
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False,
                               exclude_frozen_parameters=True)
        processes.barrier()
        if processes.is_main:
            with atomic_write(folder / "latest") as stream:
                stream.write(tag)
            for old in folder.glob("step_*"):
                if old.name != tag:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        if isinstance(error, RuntimeError) and not re.search("write|PytorchStreamWriter|No space", str(error)):
            raise
        shutil.rmtree(folder / tag, ignore_errors=True)
        raise UserError(f"{folder / tag} could not be written ({str(error).splitlines()[0]}); free some space and run "
                        "the same command again: it goes on from the previous checkpoint") from error
    processes.barrier()


def load_checkpoint(engine: Any, folder: Path, world_size: int) -> dict[str, Any] | None:
    """Restores the last whole checkpoint; returns its state, None if there is none.

    Raises:
        UserError: it was written by another number of processes, each of which kept a part.
    """
    if not (folder / "latest").is_file():
        return None
    tag = (folder / "latest").read_text(encoding="utf-8").strip()
    parts = len(list((folder / tag).glob("*optim_states.pt")))  # none without ZeRO
    if parts not in (0, world_size):
        raise UserError(f"{folder / tag} was written by {parts} processes and this run has {world_size}; start as many "
                        f"as before, or remove {folder} to start anew")
    path, state = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
    if path is None:
        raise UserError(f"{folder / tag} can't be read; remove {folder} to start this run anew")
    return state


def remove_checkpoints(folder: Path) -> None:
    """Called when the finished model is on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
