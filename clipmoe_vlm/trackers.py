"""TensorBoard and Weights & Biases for the programs: both get the numbers of a run's JSON-lines files.

The files are the truth: a resumed run cuts them at its checkpoint, and what a tracker lacks of them it then gets.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, write_json

TRACKERS = ("tensorboard", "wandb")


def check_trackers(names: Iterable[str]) -> None:
    """Raises:
        UserError: there is no such tracker, or its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"trackers: {name!r} is not one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; type `pip install {name}`, or leave it out")


def scalars(values: dict) -> Iterator[tuple[str, float]]:
    """Numbers under their names; dicts, and lists with an entry per layer (and expert), as one number each."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from scalars({f"{name}/{key}": entry for key, entry in value.items()})
        elif isinstance(value, list):
            part = "expert" if "layer_" in name else "layer"
            yield from scalars({f"{name}/{part}_{number}": entry for number, entry in enumerate(value)})
        elif isinstance(value, (int, float)):
            yield name, value


class TensorBoard:
    """A TensorBoard run in the folder `place`.

    It is written anew from what was logged before: a killed process loses the events of up to two minutes, and those
    beyond the checkpoint would be there twice.

    Args:
        logged: (step, values) of the JSON lines so far.
    """

    def __init__(self, place: Path, logged: Iterable[tuple[int, dict]] = ()):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(place, ignore_errors=True)
        self.writer = SummaryWriter(str(place))
        for step, values in logged:
            self.log(step, values)

    def log(self, step: int, values: dict) -> None:
        for name, value in scalars(values):
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, file: Path) -> None:
        self.writer.add_text(name, file.read_text(encoding="utf-8"))

    def close(self) -> None:
        self.writer.close()


def start_wandb(config: Any, folder: Path, project: str) -> None:
    """Begins, or resumes, the W&B run of this output folder. W&B's own variables (WANDB_PROJECT, WANDB_MODE, ...) say
    where it goes; `project` is the default.

    Raises:
        UserError: W&B refuses, e.g. nobody is logged in.
    """
    import wandb

    file = folder / "wandb.json"
    if not file.is_file():
        write_json(file, {"id": uuid.uuid4().hex})
    name = json.loads(file.read_text())["id"]
    for older in folder.glob(f"wandb/offline-run-*-{name}"):
        shutil.rmtree(older, ignore_errors=True)  # without a network a resumed run sends everything again
    try:
        wandb.init(id=name, resume="allow", dir=str(folder), config=dataclasses.asdict(config),
                   project=os.environ.get("WANDB_PROJECT", project), name=os.environ.get("WANDB_NAME", folder.name))
    except wandb.Error as error:
        raise UserError(f"trackers: wandb does not start ({error}); type `wandb login`, or set WANDB_MODE=offline and "
                        "send the run later with `wandb sync`") from error


def send_to_wandb(row: int, values: dict) -> None:
    """`row`, the number of the line in `metrics.jsonl` from 1, is W&B's own step: W&B can't take steps back."""
    import wandb

    wandb.run.log(dict(scalars(values)), step=row)


def catch_up_wandb(rows: Iterable[dict]) -> None:
    """Sends what W&B lacks of all rows: a killed process loses its last ones."""
    import wandb

    first = wandb.run.step
    for number, values in enumerate(rows, 1):
        if number >= first:
            send_to_wandb(number, values)
