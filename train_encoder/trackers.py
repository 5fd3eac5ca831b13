"""What a training writes as it runs: `metrics.jsonl`, `routing.jsonl`, and the same numbers to TensorBoard and W&B."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.intervals import Interval
from clipmoe_vlm.moe import Router
from clipmoe_vlm.routing import router_movement, routing_statistics
from clipmoe_vlm.runs import Metrics, read_jsonl
from clipmoe_vlm.trackers import TensorBoard, catch_up_wandb, send_to_wandb, start_wandb

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
        self.trackers = []
        if "tensorboard" in config.trackers:
            rows = [(row.pop("step"), row) for row in logged_rows(folder) if row.pop("stage") == self.stage]
            self.trackers.append(TensorBoard(folder / "tensorboard" / self.stage, rows))
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
            tracker.log(step, values)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def routers_that_train(model: CLIPMoEModel) -> dict[str, list[Tensor]]:
    """The routers' weights, layer by layer, of each tower in which they train."""
    towers = {tower: [module.weight for module in getattr(model, f"{tower}_model").modules()
                      if isinstance(module, Router) and module.weight.requires_grad] for tower in ("vision", "text")}
    return {tower: weights for tower, weights in towers.items() if weights}


def logged_rows(folder: Path) -> Iterator[dict]:
    """What the JSON-lines files of a run hold, update by update, each followed by its routing."""
    routing = {}
    if (folder / "routing.jsonl").is_file():
        routing = {(row["stage"], row["step"]): row for row in read_jsonl(folder / "routing.jsonl")}
    for row in read_jsonl(folder / "metrics.jsonl"):
        yield row | routing.get((row["stage"], row["step"]), {})


class _WandB:
    """One Weights & Biases run over all trainings, each with its own names and its own count of updates."""

    def __init__(self, folder: Path, stage: str):
        self.stage = stage
        self.before = sum(row["stage"] != stage for row in logged_rows(folder))
        catch_up_wandb(named_by_stage(folder))

    def log(self, step: int, values: dict) -> None:
        send_to_wandb(self.before + step, by_stage({"stage": self.stage, "step": step, **values}))

    def close(self) -> None:
        pass  # the next training goes on with the same run


def by_stage(row: dict) -> dict:
    """A row with its stage in front of every name."""
    return {f"{row['stage']}/{name}": value for name, value in row.items() if name != "stage"}


def named_by_stage(folder: Path) -> Iterator[dict]:
    return map(by_stage, logged_rows(folder))


def open_wandb(config: EncoderConfig, folder: Path) -> None:
    """Begins, or resumes, the W&B run of this output folder. Raises as `start_wandb`."""
    import wandb

    start_wandb(config, folder, "train_encoder")
    for training in trainings(config):
        wandb.run.define_metric(f"{training.metric}/step")
        wandb.run.define_metric(f"{training.metric}/*", step_metric=f"{training.metric}/step")


def finish(run: Run, scores: dict[str, dict[str, Interval]]) -> None:
    """Gives the finished run's trackers the scores of every model, and TensorBoard the summary."""
    if "tensorboard" in run.config.trackers:
        board = TensorBoard(run.folder / "tensorboard" / "summary")
        board.text("summary", run.folder / "summary.md")
        board.close()
    if "wandb" in run.config.trackers:
        import wandb

        catch_up_wandb(named_by_stage(run.folder))  # nothing was, if every training had ended before
        wandb.run.summary.update({f"{model}/{measure}": interval.mean for model, values in scores.items()
                                  for measure, interval in values.items()})
        wandb.finish()
