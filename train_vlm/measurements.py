"""What is measured as training goes on: the loss on held-out samples, a few answers, and eval_vlm's suites.

Nothing here moves the training: no gradient, no dropout, no draw from a generator that it uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from train_vlm.answers import Question, answer, choose_questions
from train_vlm.data import make_dataset
from train_vlm.engine import told_once
from train_vlm.evaluation import check_evaluation, evaluate
from train_vlm.samples import read_samples
from train_vlm.saving import generation_config
from train_vlm.validation import shared_samples, validation_loss

if TYPE_CHECKING:
    from train_vlm.log import RunLog
    from train_vlm.train import Run

EARLY = (10, 100)  # updates after which answers are shown too: that a run is broken shows soon


class Measurements:
    """Takes every measurement that the configuration asks for when its step has come.

    Raises:
        UserError: the held-out data, or the configuration of the suites, can't be used.
    """

    def __init__(self, run: Run, log: RunLog | None):
        config = run.config
        self.run, self.log = run, log
        # What a killed process measured at the very step that this one goes on from is not measured again.
        self.done = run.processes.main_first(lambda: log.measured)
        self.held_out = None
        self.questions: list[Question] = []
        if config.validation_data:
            samples = run.processes.main_first(partial(read_samples, config.validation_data, config.image_folder,
                                                       run.output / "data"))
        with told_once(run.processes):
            if config.validation_data:
                self.held_out = make_dataset(config, samples, run.model, run.processor)
                self.also_trained_on = shared_samples(samples, run.dataset.samples) if log else 0
                if self.also_trained_on:
                    log.say(f"warning: {self.also_trained_on} of the {len(samples)} samples in "
                            f"{config.validation_data} (same words, same pictures) are trained on, too: the validation "
                            "loss will look too good")
            if config.answers:
                dataset = self.held_out[0] if self.held_out else run.dataset
                self.questions = choose_questions(dataset, run.processor, config.answers)
            if config.evaluation:
                check_evaluation(config.evaluation)

    def take(self, step: int) -> None:
        """After `step` updates; every process calls it."""
        run, log = self.run, self.log
        done = self.done if step == run.first_step else ()
        due = step % run.config.validation_every == 0 or step == run.total_steps
        if self.held_out and due and "validation_loss" not in done:
            with evaluating(run.engine):
                found = validation_loss(run, *self.held_out)
            if log:
                log.measurement(step, **found, validation_also_trained_on=self.also_trained_on)
        if self.questions and (due or step in EARLY) and "answers" not in done:
            generation_config(run.model, run.processor)  # as it will be saved
            with evaluating(run.engine):
                answers = [answer(run, question) for question in self.questions]
            if log:
                log.answers(step, self.questions, answers)
        if self.evaluates_at(step) and "evaluation" not in done:
            scores = evaluate(run, step)
            if log:
                log.measurement(step, evaluation=scores)

    def evaluates_at(self, step: int) -> bool:
        """Such a step also gets a checkpoint: an evaluation that is killed goes on with the very same weights."""
        config, last = self.run.config, self.run.total_steps
        return bool(config.evaluation) and step > 0 and (step % (config.evaluation_every or last) == 0 or step == last)


@contextlib.contextmanager
def evaluating(engine: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in engine.modules()}
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
