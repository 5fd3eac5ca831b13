"""What a training writes as it runs: `metrics.jsonl`, `routing.jsonl`, and the same numbers to TensorBoard and W&B.

The two JSON-lines files are the truth: the report reads them alone, and a resumed run cuts them at its checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.intervals import Interval
from clipmoe_vlm.moe import Router
from clipmoe_vlm.routing import router_movement, routing_statistics
from clipmoe_vlm.runs import Metrics, UserError, read_jsonl, write_json

from .config import EncoderConfig
from .features import autocast
from .report import trainings

if TYPE_CHECKING:
    from .train import Run

ROUTING_SAMPLES = 64  # of the main process's share of a batch


class StageLog:
    """The log of one training, on the main process. Make it before the checkpoint is loaded: it keeps the routers'
    start, which is the untuned mixture in a resumed run too."""

    def __init__(self, stage: str, model: CLIPMoEModel, run: Run):
        self.stage, self.model, self.run = stage, model, run
        self.start = {tower: [weight.detach().clone() for weight in weights]
                      for tower, weights in routers_that_train(model).items()}

    def open(self, step: int) -> None:
        """Starts, or goes on after update `step`: what an earlier process logged beyond it is dropped."""

        def keep(row: dict) -> bool:
            return row["stage"] != self.stage or row["step"] <= step

        config, folder = self.run.config, self.run.folder
        self.metrics = Metrics(folder / "metrics.jsonl", keep)
        self.routing = Metrics(folder / "routing.jsonl", keep) if self.start else None
        self.trackers = [_TensorBoard(folder, self.stage)] if "tensorboard" in config.trackers else []
        if "wandb" in config.trackers:
            self.trackers.append(_WandB(folder, self.stage))
        self.clock = time.perf_counter()

    def update(self, step: int, **values: Any) -> None:
        """One line about an update; its `seconds` also count the wait for data and what was logged and saved before."""
        before, self.clock = self.clock, time.perf_counter()
        self._write(self.metrics, step, {**values, "seconds": round(self.clock - before, 4)})

    def update_routing(self, step: int, total: int, batch: dict) -> None:
        """Every so many updates, while routers train: every layer's load and entropy for some samples of the batch, and
        how far its router has moved.

        The samples go through the model once more, without expert dropout: that costs less than keeping every layer's
        router logits of every chunk of every batch.
        """
        device, readable = self.run.distributed.device, batch["valid"]
        due = step % self.run.config.log_routing_every == 0 or step in (1, total)
        if not (self.start and due and readable.any()):
            return
        pixels, ids = (batch[key][readable][:ROUTING_SAMPLES].to(device) for key in ("pixel_values", "input_ids"))
        self.model.eval()
        with autocast(self.run.distributed, self.run.config.precision):
            values = routing_statistics(self.model, pixels, ids)
        self.model.train()
        for tower, weights in routers_that_train(self.model).items():
            values[f"{tower}_moved"] = router_movement([w.detach() for w in weights], self.start[tower]).tolist()
        self._write(self.routing, step, values)

    def _write(self, file: Metrics, step: int, values: dict) -> None:
        file.log(stage=self.stage, step=step, **values)
        for tracker in self.trackers:
            tracker.log(step, dict(scalars(values)))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def routers_that_train(model: CLIPMoEModel) -> dict[str, list[Tensor]]:
    """The routers' weights, layer by layer, of each tower in which they train."""
    towers = {tower: [module.weight for module in getattr(model, f"{tower}_model").modules()
                      if isinstance(module, Router) and module.weight.requires_grad] for tower in ("vision", "text")}
    return {tower: weights for tower, weights in towers.items() if weights}


def scalars(values: dict) -> Iterator[tuple[str, float]]:
    """Numbers under their names; lists, which have an entry per layer (and expert), as one number each."""
    for name, value in values.items():
        if isinstance(value, list):
            part = "expert" if "layer_" in name else "layer"
            yield from scalars({f"{name}/{part}_{number}": entry for number, entry in enumerate(value)})
        elif isinstance(value, (int, float)):
            yield name, value


def logged_rows(folder: Path) -> Iterator[dict]:
    """What the JSON-lines files of a run hold, update by update, each followed by its routing."""
    routing = {}
    if (folder / "routing.jsonl").is_file():
        routing = {(row["stage"], row["step"]): row for row in read_jsonl(folder / "routing.jsonl")}
    for row in read_jsonl(folder / "metrics.jsonl"):
        yield row | routing.get((row["stage"], row["step"]), {})


class _TensorBoard:
    """A TensorBoard run per training, `tensorboard/<stage>`.

    A resumed one is written anew from the JSON lines: a killed process loses the events of up to two minutes, and those
    beyond the checkpoint would be there twice.
    """

    def __init__(self, folder: Path, stage: str):
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard" / stage
        shutil.rmtree(place, ignore_errors=True)
        self.writer = SummaryWriter(str(place))
        for row in logged_rows(folder):
            if row.pop("stage") == stage:
                self.log(row.pop("step"), dict(scalars(row)))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """One Weights & Biases run over all trainings, each with its own names and its own count of updates.

    W&B's step is the row in `metrics.jsonl`. W&B cannot take rows back, and a killed process loses its last ones: so a
    resumed run sends what W&B lacks, which without a network is everything (`start_wandb` drops the older folder).
    """

    def __init__(self, folder: Path, stage: str):
        self.stage = stage
        self.before = sum(row["stage"] != stage for row in logged_rows(folder))
        catch_up_wandb(folder)

    def log(self, step: int, values: dict[str, float]) -> None:
        send_to_wandb(self.before + step, self.stage, step, values)

    def close(self) -> None:
        pass  # the next training goes on with the same run


def send_to_wandb(place: int, stage: str, step: int, values: dict[str, float]) -> None:
    import wandb

    values = {f"{stage}/{name}": value for name, value in values.items()}
    wandb.run.log({f"{stage}/step": step, **values}, step=place)


def catch_up_wandb(folder: Path) -> None:
    """Sends what W&B lacks of the JSON-lines files."""
    import wandb

    first = wandb.run.step
    for place, row in enumerate(logged_rows(folder), 1):
        if place >= first:
            send_to_wandb(place, row.pop("stage"), row.pop("step"), dict(scalars(row)))


def start_wandb(config: EncoderConfig, folder: Path) -> None:
    """Begins, or resumes, the W&B run of this output folder. W&B's own variables (WANDB_PROJECT, WANDB_MODE, ...) say
    where it goes.

    Raises:
        UserError: W&B refuses, e.g. nobody is logged in.
    """
    import wandb

    file = folder / "wandb.json"
    if not file.is_file():
        write_json(file, {"id": uuid.uuid4().hex})
    name = json.loads(file.read_text())["id"]
    for older in folder.glob(f"wandb/offline-run-*-{name}"):
        shutil.rmtree(older, ignore_errors=True)
    try:
        wandb.init(id=name, resume="allow", dir=str(folder), config=dataclasses.asdict(config),
                   project=os.environ.get("WANDB_PROJECT", "train_encoder"),
                   name=os.environ.get("WANDB_NAME", folder.name))
    except wandb.Error as error:
        raise UserError(f"trackers: wandb does not start ({error}); type `wandb login`, or set WANDB_MODE=offline and "
                        "send the run later with `wandb sync`") from error
    for training in trainings(config):
        wandb.run.define_metric(f"{training.metric}/step")
        wandb.run.define_metric(f"{training.metric}/*", step_metric=f"{training.metric}/step")


def finish(run: Run, scores: dict[str, dict[str, Interval]]) -> None:
    """Gives the finished run's trackers the scores of every model, and TensorBoard the summary."""
    if "tensorboard" in run.config.trackers:
        from torch.utils.tensorboard import SummaryWriter

        place = run.folder / "tensorboard" / "summary"
        shutil.rmtree(place, ignore_errors=True)
        with SummaryWriter(str(place)) as writer:
            writer.add_text("summary", (run.folder / "summary.md").read_text(encoding="utf-8"))
    if "wandb" in run.config.trackers:
        import wandb

        catch_up_wandb(run.folder)  # nothing was, if every training had ended before
        wandb.run.summary.update({f"{model}/{measure}": interval.mean for model, values in scores.items()
                                  for measure, interval in values.items()})
        wandb.finish()
