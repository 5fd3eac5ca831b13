"""What a run writes and prints as it goes, on the main process: JSON lines, trackers, the progress bar, sentences."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipmoe_vlm.runs import Metrics, progress, read_jsonl
from clipmoe_vlm.trackers import TensorBoard, catch_up_wandb, send_to_wandb
from train_vlm.answers import Question

if TYPE_CHECKING:
    from train_vlm.train import Run


class RunLog:
    """Opens the logs. A resumed run first drops what lies behind its checkpoint, evaluations included.

    Attributes:
        measured: names of what was measured already at the step that the run goes on from.
    """

    def __init__(self, run: Run):
        config, output, first_step = run.config, run.output, run.first_step

        def keep(row: dict) -> bool:
            return row["step"] <= first_step

        self.metrics = Metrics(output / "metrics.jsonl", keep)
        has_routers = run.model.config.vision_config.num_experts > 1
        self.routing = Metrics(output / "routing.jsonl", keep) if has_routers else None
        self.given = Metrics(output / "answers.jsonl", keep) if config.answers else None
        self.problems = Metrics(output / "problems.jsonl", keep)
        for folder in (output / "evaluations").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > first_step:
                shutil.rmtree(folder)
        logged = list(logged_rows(output))
        self.rows = len(logged)
        self.measured = [name for row in logged if row["step"] == first_step for name in row]
        if config.answers and any(row["step"] == first_step for row in read_jsonl(output / "answers.jsonl")):
            self.measured.append("answers")
        self.board, self.wandb = None, "wandb" in config.trackers
        if "tensorboard" in config.trackers:
            self.board = TensorBoard(output / "tensorboard", ((row["step"], values_of(row)) for row in logged))
        if self.wandb:
            import wandb

            wandb.run.define_metric("*", step_metric="step")
            catch_up_wandb(logged)
        self.bar = progress(description="train_vlm", total=run.total_steps, initial=first_step)
        self.say(f"resumed after step {first_step} of {run.total_steps}" if first_step else
                 f"{run.total_steps} steps of {run.config.global_batch_size} samples")

    def say(self, text: str) -> None:
        self.bar.write(text)

    def update(self, step: int, problems: list[str], cut: list[str], *, loss: float, seconds: float, tokens: int,
               routing: dict[str, list] | None = None, **values: Any) -> None:
        """One line about an update.

        Args:
            step: updates made so far.
            problems: samples that could not be used, each with its reason.
            cut: ids of samples cut at `max_length`, of the main process's share.
            seconds: of the whole update, the wait for its data included.
            tokens: of the global batch, without padding.
            routing: what `routing.jsonl` gets of this step.
        """
        rest = {"tokens": tokens, "seconds": round(seconds, 4), "tokens_per_second": round(tokens / seconds, 1),
                "peak_memory_gib": round(peak_memory() / 2**30, 3)}
        self._write({"step": step, "loss": loss, **values, **rest}, routing)
        if problems or cut:
            self.problems.log(step=step, skipped=problems, truncated=cut)
        for problem in problems:
            self.say(f"skipped sample {problem}")
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()

    def measurement(self, step: int, **values: Any) -> None:
        """A line of its own for what was measured after `step` updates."""
        self._write({"step": step, **values}, None)
        if "validation_loss" in values:
            self.say(f"after step {step}: validation loss {values['validation_loss']:.4f} "
                     f"({values['validation_samples']} samples, {values['validation_seconds']:.1f} s)")
        if "evaluation" in values:
            self.say(f"after step {step}: " + ", ".join(f"{name} {x:.1f}" for name, x in values["evaluation"].items()))

    def answers(self, step: int, questions: list[Question], answers: list[str]) -> None:
        for question, answer in zip(questions, answers, strict=True):
            self.given.log(step=step, id=question.id, pictures=question.pictures, question=question.text,
                           expected=question.expected, answer=answer)
            self.say(f"after step {step}, sample {question.id}: {answer!r} (expected: {question.expected!r})")

    def _write(self, row: dict[str, Any], routing: dict[str, list] | None) -> None:
        self.metrics.log(**row)
        self.rows += 1
        if routing:
            self.routing.log(step=row["step"], **routing)
            row = row | routing
        if self.board:
            self.board.log(row["step"], values_of(row))
        if self.wandb:
            send_to_wandb(self.rows, row)

    def close(self, summary: Path | None = None) -> None:
        self.bar.close()
        if self.board:
            if summary:
                self.board.text("summary", summary)
            self.board.close()
        if self.wandb:
            import wandb

            wandb.finish()


def values_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}


def logged_rows(output: Path) -> Iterator[dict]:
    """The lines of `metrics.jsonl`, each update's with its routing."""
    file = output / "routing.jsonl"
    routing = {row["step"]: row for row in read_jsonl(file)} if file.is_file() else {}
    for row in read_jsonl(output / "metrics.jsonl"):
        yield row | routing.get(row["step"], {}) if "loss" in row else row


def peak_memory() -> int:
    """Bytes at most allocated on this process's GPU; without one, its largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
