"""Scores a VLM: `python -m eval_vlm.run CONFIG.yaml [key=value ...]`, also under torchrun.

Answers are appended to `predictions/<suite>.jsonl` as they come; a killed run goes on at the next unanswered question.
Scores come from that file alone, so another `rule` on a finished run needs no generation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import TextIO

from clipmoe_vlm.runs import (
    Distributed,
    UserError,
    init_distributed,
    prepare_output,
    progress,
    run_program,
    write_json,
)
from eval_vlm import config as config_module
from eval_vlm.config import EvalConfig
from eval_vlm.generate import Answerer
from eval_vlm.models import check_vlm_folder, find_folder, load_vlm, precision_on
from eval_vlm.page import write_run_page
from eval_vlm.predictions import (
    answered_ids,
    begin,
    check_owner,
    hash_folder,
    hash_questions,
    merge,
    part_file,
    predictions_file,
    read_predictions,
    routing_file,
    with_grades,
)
from eval_vlm.report import write_summary
from eval_vlm.suites import check_rule, module, picture_folder, report, rules_of
from eval_vlm.suites.questions import is_dataset

# What may differ when a run is typed again: none of these changes an answer, or the predictions' own check sees it.
MAY_CHANGE = ("batch_size", "rule", "suites",
              *(f"{suite}.{key.name}" for suite in config_module.SUITES
                for key in dataclasses.fields(getattr(EvalConfig(model="", output_dir=""), suite))))


def main(config: EvalConfig) -> None:
    if evaluate(config):
        print((Path(config.output_dir) / "summary.md").read_text(encoding="utf-8"))
        print(f"The report: {(Path(config.output_dir) / 'report.html').resolve()}")


def evaluate(config: EvalConfig) -> dict:
    """Answers and scores; returns the content of scores.json (on other processes than the main one {})."""
    questions = load_questions(config)
    place = init_distributed()
    folder = place.main_first(
        lambda: prepare(config, {suite: records for suite, (records, _, _) in questions.items()},
                        precision_on(place.device, config.precision)))

    answerer = None
    for suite, (records, _, pictures) in questions.items():
        answered = answered_ids(config.output_dir, suite, records)
        mine = share(records, place)
        todo = sum(record["id"] not in answered for record in mine)
        if todo:
            if answerer is None:
                model, processor = load_vlm(folder, place.device, config.precision)
                answerer = Answerer(model, processor, config.batch_size, config.max_new_tokens, config.answering)
            answer_all(answerer, mine, pictures, answered, config, suite, todo, place)
    place.barrier()
    if not place.is_main:
        return {}
    return score_all(config, {suite: (records, hashes) for suite, (records, hashes, _) in questions.items()})


def load_questions(config: EvalConfig) -> dict[str, tuple[list[dict], dict[str, str], Path]]:
    """Of each suite its records with their prompts, the hashes of its files, and the folder of its pictures.

    Raises:
        UserError: the configuration, a question file or a picture is at fault.
    """
    config_module.check(config)
    for suite in config.suites:
        check_rule(config.rule, rules_of(suite))
    sources = {suite: getattr(getattr(config, suite), config_module.SOURCE[suite]) for suite in config.suites}
    absent = [suite for suite, source in sources.items() if not Path(source).exists() and not is_dataset(source)]
    if absent:
        rest = ",".join(suite for suite in config.suites if suite not in absent)
        raise UserError(f"no question files of {', '.join(f'{suite} ({sources[suite]})' for suite in absent)}; put "
                        f"them there, or name others: suites=[{rest}]")
    questions = {}
    for suite in config.suites:
        records, hashes = module(suite).load(getattr(config, suite), config.limit)
        folder = picture_folder(suite, getattr(config, suite))
        for record in records:
            record["prompt"] = module(suite).prompt(record, config.prompt_suffix)
        check_pictures(records, folder)
        questions[suite] = (records, hashes, folder)
    return questions


def prepare(config: EvalConfig, questions: dict[str, list[dict]], precision: str) -> Path:
    """Checks that what the output folder holds belongs to this run, and makes it ready for appending.

    Args:
        precision: the one that the model runs in here, no longer `auto`.

    Returns:
        the model's folder.
    """
    folder = find_folder(config.model)
    check_vlm_folder(folder)
    model_hash = hash_folder(folder)
    owners = {}
    for suite, records in questions.items():
        owners[suite] = {"model_sha256": model_hash, "questions_sha256": hash_questions(records),
                         "max_new_tokens": config.max_new_tokens, "precision": precision,
                         "answering": config.answering}
        file = predictions_file(config.output_dir, suite)
        check_owner(file, owners[suite])
        read_predictions(file, records)  # refuses broken ones before anything is written
    prepare_output(config, MAY_CHANGE)
    for suite, records in questions.items():
        begin(config.output_dir, suite, owners[suite])
        merge(config.output_dir, suite, records)
    return folder


def share(records: list[dict], place: Distributed) -> list[dict]:
    """This process's records: whole pictures, in turn."""
    order = {image: index for index, image in enumerate(dict.fromkeys(record["image"] for record in records))}
    return [record for record in records if order[record["image"]] % place.world_size == place.rank]


def check_pictures(records: list[dict], folder: Path) -> None:
    """Raises:
        UserError: a picture is not there (names its file and the first question about it).
    """
    missing = {}
    for record in records:
        if record["image"] not in missing and not (folder / record["image"]).is_file():
            missing[record["image"]] = record["id"]
    if missing:
        image, question = next(iter(missing.items()))
        raise UserError(f"{folder / image}: there is no such picture (question {question}; {len(missing)} pictures are "
                        "missing in all); put it there or set the suite's folder")


def answer_all(answerer: Answerer, records: list[dict], pictures: Path, answered: set[str], config: EvalConfig,
               suite: str, todo: int, place: Distributed) -> None:
    """Appends the answers, each on the disk's side of this process as soon as it is known, its picture's routing
    before it."""
    files = [part_file(file, place.rank) for file in (predictions_file(config.output_dir, suite),
                                                      routing_file(config.output_dir, suite))]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(open(files[0], "a", encoding="utf-8"))
        routing = None
        bar = stack.enter_context(progress(description=f"{suite} questions", total=todo, enabled=place.is_main))
        for record, result in answerer.answers(records, pictures, answered):
            for row in answerer.take_routing():
                routing = routing or stack.enter_context(open(files[1], "a", encoding="utf-8"))
                append(routing, row)
            append(answers, {**record, **result})
            bar.update()
        for stream in (routing, answers):
            if stream:
                os.fsync(stream.fileno())


def append(stream: TextIO, row: dict) -> None:
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    stream.flush()


def score_all(config: EvalConfig, questions: dict[str, tuple[list[dict], dict[str, str]]]) -> dict:
    """Reads the predictions, writes scores.json, summary.md, report.html and the files for the benchmarks' servers and
    judges."""
    scores: dict = {"model": config.model, "rule": config.rule, "batch_size": config.batch_size,
                    "max_new_tokens": config.max_new_tokens, "answering": config.answering,
                    "prompt_suffix": config.prompt_suffix,
                    "limit": config.limit, "answers": {}, "cut_answers": {}, "submissions": {}, "suites": {}}
    for suite, (records, hashes) in questions.items():
        file = predictions_file(config.output_dir, suite)
        predictions = merge(config.output_dir, suite, records)
        unanswered = [record["id"] for record in records if record["id"] not in predictions]
        if unanswered:
            raise UserError(f"{file} lacks {len(unanswered)} answers, the first for question {unanswered[0]}; "
                            "run the same command again")
        rows = with_grades(config.output_dir, suite, [predictions[record["id"]] for record in records])
        scores["answers"][suite] = len(rows)
        scores["cut_answers"][suite] = sum(row.get("cut", False) for row in rows)
        scores["suites"][suite] = report(suite, rows, config.rule, hashes)
        if hasattr(module(suite), "write_submission"):
            scores["submissions"][suite] = submit(suite, rows, Path(config.output_dir))
    output = Path(config.output_dir)
    write_json(output / "scores.json", scores)
    write_summary(output / "summary.md", scores)
    write_run_page(output)
    return scores


def submit(suite: str, rows: list[dict], output: Path) -> str:
    """Writes what the suite's server or judge reads and returns its place, or why there is none."""
    name = f"submissions/{suite}{getattr(module(suite), 'SUBMISSION', '.json')}"
    try:
        module(suite).write_submission(rows, output / name)
    except UserError as error:  # a package that one file needs is no reason to lose the scores
        return str(error)
    return name


if __name__ == "__main__":
    run_program(main, EvalConfig, "python -m eval_vlm.run")
