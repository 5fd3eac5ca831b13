"""eval_vlm's suites during training, on the model as it stands."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmoe_vlm.runs import load_config
from train_vlm.saving import gather_weights, save_vlm

if TYPE_CHECKING:
    from train_vlm.train import Run


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Scores the model after `step` updates in `evaluations/step_<step>`; every process calls it and takes its share.

    The model goes through a folder like the finished one, so the scores are those of `python -m eval_vlm.run`.

    Returns:
        the main scores, by `suite/set`; {} on other processes than the main one.

    Raises:
        UserError: as eval_vlm.
    """
    from eval_vlm.report import headline
    from eval_vlm.run import evaluate as score

    parent = run.output / "evaluations"
    config = suites_config(run.config.evaluation, parent / "model", parent / f"step_{step}")
    weights = gather_weights(run.model, run.config.zero_stage, run.processes.is_main)
    if run.processes.is_main:
        save_vlm(run.model, weights, run.processor, parent / "model")
    del weights
    run.processes.barrier()
    scores = score(config)
    run.processes.barrier()
    if not run.processes.is_main:
        return {}
    shutil.rmtree(parent / "model")
    return headline(scores)


def suites_config(file: str, model: Path, output: Path) -> Any:
    """eval_vlm's configuration in `file`, for this model."""
    from eval_vlm.config import EvalConfig

    config = load_config(EvalConfig, [file, "model=given", "output_dir=given"], "evaluation:")
    return dataclasses.replace(config, model=str(model), output_dir=str(output))


def check_evaluation(file: str) -> None:
    """Reads all questions once, so that a mistake in `file` shows before training and not hours later.

    Raises:
        UserError: as eval_vlm.
    """
    from eval_vlm.run import load_questions

    load_questions(suites_config(file, Path("model"), Path("evaluations")))
