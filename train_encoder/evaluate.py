"""Zero-shot scores of CLIPs and CLIP-MoEs: `python -m train_encoder.evaluate CONFIG.yaml [key=value ...]`, also under
torchrun. A model made by train_encoder is compared with its base. docs/evaluation.md has tasks, files and scores.

Each model's result on each task is written when it is there (`results/MODEL/TASK.json`) and not made again.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from transformers.utils import logging

from clipmoe_vlm.convert import load_model, local, processors_of
from clipmoe_vlm.runs import Distributed, UserError, init_distributed, prepare_output, run_program, write_json

from .compare import print_red
from .config import check_precision
from .data import Collate
from .evaluation_summary import losses_to_bases, write_summary
from .tasks import TaskConfig, load_hard_captions, load_retrieval
from .zero_shot import Classification, Encoder, HardCaptions, Retrieval, line

MAY_CHANGE = ("workers",)
Task = Retrieval | Classification | HardCaptions


@dataclass
class EvaluateConfig:
    """A whole evaluation: every model on every task."""

    output_dir: str = MISSING
    # NAME: a source that `python -m clipmoe_vlm convert` takes, or an output folder of train_encoder; or NAME:
    # {source: ..., architecture: ..., top_k: ...} for weight files that do not say these themselves.
    models: dict[str, Any] = MISSING
    tasks: dict[str, TaskConfig] = MISSING  # NAME: {kind: ..., data: ..., ...}
    # The model that the others are compared with: its name in `models`, or a source. null: the model called base, else
    # for each output of train_encoder its own base.
    base: str | None = None
    precision: str = "fp32"  # fp32 | bf16 | fp16
    workers: int = 4


@dataclass
class Source:
    """Where a model comes from, and the name of the base it is compared with."""

    source: str
    architecture: str | None = None
    top_k: int | None = None
    base: str | None = field(default=None, compare=False)


def main(config: EvaluateConfig) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers run inside forked workers
    logging.disable_progress_bar()
    distributed = init_distributed()
    folder = Path(config.output_dir)
    models = distributed.main_first(lambda: with_bases(config))

    def prepare() -> dict[str, Task]:
        check(config, models, distributed)
        prepare_output(config, MAY_CHANGE)
        tasks = {name: load_task(name, task, folder) for name, task in config.tasks.items()}
        check_finished(folder, models, config.tasks)
        return tasks

    tasks = distributed.main_first(prepare)
    for name, source in models.items():
        todo = distributed.main_first(lambda name=name: [task for task in tasks
                                                         if not result_file(folder, name, task).is_file()])
        encoder = None  # frees the model before
        if todo:
            encoder = load(name, source, config, distributed)
        for task in todo:
            encoder.name, encoder.scratch = f"{name} on {task}", folder / f".{name}.{task}"
            measured = tasks[task].measure(encoder)
            if measured is not None:
                result = {"model": source.source, "task": task, **measured,
                          "files": fingerprints(source, config.tasks[task])}
                encoder.scratch.rmdir()
                write_json(result_file(folder, name, task), result)
                print(f"[{name}] {task}: {line(result)}", flush=True)
    if distributed.is_main:
        results = {task: {name: json.loads(result_file(folder, name, task).read_text(encoding="utf-8"))
                          for name in models} for task in tasks}
        bases = {name: source.base for name, source in models.items() if source.base}
        write_summary(folder, results, bases)
        for sentence in losses_to_bases(results, bases):
            print_red(sentence)
        print(f"done: scores in {folder / 'scores.json'}, the summary in {folder / 'summary.md'}", flush=True)
    distributed.barrier()


def check(config: EvaluateConfig, models: dict[str, Source], distributed: Distributed) -> None:
    """Raises:
        UserError: a value that cannot work.
    """
    if not config.models or not config.tasks:
        raise UserError("models and tasks: name at least one of each")
    for group, names in (("models", models), ("tasks", config.tasks)):
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(f"{group}: the name {name!r} becomes a file's name; use letters, digits, - and _ only")
    check_precision(config.precision, distributed)
    if config.workers < 0:
        raise UserError(f"workers: {config.workers} must be at least 0")


def with_bases(config: EvaluateConfig) -> dict[str, Source]:
    """The models to evaluate by name, the bases that they bring along among them.

    Raises:
        UserError: a model's entry is neither a source nor has one.
    """
    models = {}
    for name, value in config.models.items():
        values = {"source": value} if isinstance(value, str) else value
        if not isinstance(values, dict) or not isinstance(values.get("source"), str) or (
                set(values) - {"source", "architecture", "top_k"}):
            raise UserError(f"models.{name}: expected a source, or source with architecture and top_k; found {value!r}")
        models[name] = Source(**values)
        if (Path(models[name].source) / "model" / "config.json").is_file():  # an output folder of train_encoder
            models[name].source = str(Path(models[name].source) / "model")
    base = config.base or ("base" if "base" in models else None)
    for name, model in list(models.items()):
        own = Path(model.source).parent / "base"
        if base:
            model.base = base if base in models else "base"
            models.setdefault(model.base, Source(base))
        elif Path(model.source).name == "model" and (own / "config.json").is_file():
            its_base = Source(str(own))
            model.base = "base" if models.get("base", its_base) == its_base else f"base_of_{name}"
            models[model.base] = its_base
    for name, model in models.items():
        model.base = None if model.base == name else model.base
    # Bases first: their scores are what one waits for the others' to be compared with.
    bases = {model.base for model in models.values()}
    return {name: models[name] for name in sorted(models, key=lambda name: name not in bases)}


def load_task(name: str, config: TaskConfig, folder: Path) -> Task:
    """Reads a task's files; captions files and shards through an index in the output folder.

    Raises:
        UserError: what is wrong with them.
    """
    if config.kind == "retrieval":
        return load_retrieval(config.data, folder / "index" / f"{name}.jsonl", config.image_column,
                              config.caption_column, config.image_root, config.split or "test")
    if config.kind not in ("classification", "hard_captions"):
        raise UserError(f"tasks.{name}.kind: {config.kind!r} is not one of retrieval, classification, hard_captions")
    if not Path(config.data).exists():
        raise UserError(f"tasks.{name}.data: {config.data}: no such file or folder")
    if config.kind == "hard_captions":
        return load_hard_captions(config.data, config.image_root)
    from .classes import load_classification  # slow to import

    return load_classification(config)


def load(name: str, source: Source, config: EvaluateConfig, distributed: Distributed) -> Encoder:
    """The model in float32 with its own processors.

    Raises:
        UserError: it cannot be loaded, or has no tokenizer.
    """
    try:
        model = load_model(source.source, source.architecture, source.top_k).float()
        image_processor, tokenizer = processors_of(source.source, source.architecture, model.config)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"models.{name}: {error}") from error
    if tokenizer is None:
        raise UserError(f"models.{name}: {source.source} has no tokenizer files, and its vocabulary is not CLIP's; put "
                        "a tokenizer_config.json with its files into its folder")
    collate = Collate(image_processor, tokenizer, model.config.text_config.max_position_embeddings,
                      model.config.vision_config.image_size)
    return Encoder(name, model.to(distributed.device).eval(), collate, distributed, config.workers, config.precision,
                   Path(config.output_dir))


def result_file(folder: Path, model: str, task: str) -> Path:
    return folder / "results" / model / f"{task}.json"


def fingerprints(source: Source, task: TaskConfig) -> list[list]:
    """Names, sizes and times of a model's and of a task's files (in a folder: of what lies in it), which tell whether
    they were replaced."""
    return [[entry for path in paths for entry in _fingerprint(path)] for paths in (
        [local(source.source)], [Path(file) for file in (task.data, task.classes, task.templates) if file])]


def _fingerprint(path: Path) -> list[list]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, int(file.stat().st_mtime)] if file.is_file() else [file.name]
            for file in files]


def check_finished(folder: Path, models: dict[str, Source], tasks: dict[str, TaskConfig]) -> None:
    """Raises:
        UserError: a finished result was made from other files than are there now.
    """
    for name, source in models.items():
        for task, config in tasks.items():
            file = result_file(folder, name, task)
            if file.is_file():
                then = json.loads(file.read_text(encoding="utf-8"))["files"]
                now = fingerprints(source, config)
                for what, before, after in zip((source.source, config.data), then, now, strict=True):
                    if before != after:
                        raise UserError(f"{what} changed since {file} was made; remove that file to measure again")


if __name__ == "__main__":
    run_program(main, EvaluateConfig, "python -m train_encoder.evaluate")
