"""Scores a VLM: `python -m eval_vlm.run CONFIG.yaml [key=value ...]`, also under torchrun.

Answers are appended to `predictions/<suite>.jsonl` as they come; a killed run goes on at the next unanswered question.
Scores come from that file alone, so another `rule` on a finished run needs no generation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from clipmoe_vlm.runs import (
    Distributed,
    UserError,
    atomic_write,
    init_distributed,
    prepare_output,
    progress,
    run_program,
    set_seed,
    write_json,
)
from eval_vlm import config as config_module
from eval_vlm.config import EvalConfig
from eval_vlm.generate import Answerer, check_vlm_folder, load_vlm
from eval_vlm.report import write_summary
from eval_vlm.suites import check_rule, module, picture_folder, report, rules_of

# What may differ when a run is typed again: none of these changes an answer, or the predictions' own check sees it.
MAY_CHANGE = ("batch_size", "rule", "seed", "suites",
              *(f"{suite}.{key.name}" for suite in config_module.SUITES
                for key in dataclasses.fields(getattr(EvalConfig(model="", output_dir=""), suite))))


def main(config: EvalConfig) -> None:
    if evaluate(config):
        print((Path(config.output_dir) / "summary.md").read_text(encoding="utf-8"))


def evaluate(config: EvalConfig) -> dict:
    """Answers and scores; returns the content of scores.json (on other processes than the main one {})."""
    questions = load_questions(config)
    place = init_distributed()
    set_seed(config.seed)
    place.main_first(lambda: prepare(config, {suite: records for suite, (records, _, _) in questions.items()}))

    answerer = None
    for suite, (records, _, folder) in questions.items():
        answered = set(read_predictions(predictions_file(config, suite), records))
        mine = share(records, place)
        todo = sum(record["id"] not in answered for record in mine)
        if todo:
            if answerer is None:
                model, processor = load_vlm(config.model, place.device, config.precision)
                answerer = Answerer(model, processor, config.batch_size, config.max_new_tokens)
            answer_all(answerer, mine, folder, answered, part_file(config, suite, place.rank), todo, place.is_main)
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
    questions = {}
    for suite in config.suites:
        records, hashes = module(suite).load(getattr(config, suite), config.limit)
        folder = picture_folder(suite, getattr(config, suite))
        for record in records:
            record["prompt"] = module(suite).prompt(record, config.prompt_suffix)
        check_pictures(records, folder)
        questions[suite] = (records, hashes, folder)
    return questions


def prepare(config: EvalConfig, questions: dict[str, list[dict]]) -> None:
    """Checks that what the output folder holds belongs to this run, and makes it ready for appending."""
    check_vlm_folder(Path(config.model))
    model_hash = hash_folder(Path(config.model))
    owners = {}
    for suite, records in questions.items():
        file = predictions_file(config, suite)
        owners[suite] = {"model_sha256": model_hash, "questions_sha256": hash_questions(records),
                         "max_new_tokens": config.max_new_tokens, "precision": config.precision}
        check_owner(file, owners[suite])
    prepare_output(config, MAY_CHANGE)
    for suite, records in questions.items():
        file = predictions_file(config, suite)
        write_json(owner_file(file), owners[suite])
        merge_parts(file, records)


def predictions_file(config: EvalConfig, suite: str) -> Path:
    return Path(config.output_dir) / "predictions" / f"{suite}.jsonl"


def owner_file(file: Path) -> Path:
    return file.with_suffix(".owner.json")


def part_file(config: EvalConfig, suite: str, rank: int) -> Path:
    """Where a process appends: the main one to the predictions themselves, others to a file that is merged later."""
    file = predictions_file(config, suite)
    return file if rank == 0 else file.with_suffix(f".part{rank}.jsonl")


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


def check_owner(file: Path, ours: dict) -> None:
    """Raises:
        UserError: the predictions there were made by another model, from other questions or with other settings.
    """
    if not file.exists():
        return
    owner = owner_file(file)
    try:
        theirs = json.loads(owner.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise UserError(f"{file}: {owner.name} beside it, which says what made these predictions, is missing or "
                        "broken; name another output_dir, or remove the predictions") from None
    words = {"model_sha256": "another model", "questions_sha256": "other questions or another prompt_suffix",
             "max_new_tokens": "another max_new_tokens", "precision": "another precision"}
    differences = [word for key, word in words.items() if theirs.get(key) != ours[key]]
    if differences:
        raise UserError(f"{file} holds predictions made with {' and '.join(differences)}; name another output_dir, or "
                        "remove the predictions to start anew")


def hash_questions(records: list[dict]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def hash_folder(folder: Path) -> str:
    """sha256 over names and contents of the files at the top of a model folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def read_predictions(file: Path, records: list[dict]) -> dict[str, dict]:
    """Predictions by question id; a last line that a kill cut short is left out.

    Raises:
        UserError: a broken line before the last, or a prediction for a question that is not among `records`.
    """
    if not file.exists():
        return {}
    known = {record["id"] for record in records}
    predictions = {}
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # whatever follows the last line break is not whole
        try:
            row = json.loads(line)
            question = row["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number} is not a prediction ({error!r}); remove that line, its question is "
                            "then answered anew") from error
        if question not in known:
            raise UserError(f"{file}, line {number} answers question {question}, which is not among this run's "
                            "questions; name another output_dir, or remove the predictions")
        predictions[question] = row
    return predictions


def merge_parts(file: Path, records: list[dict]) -> None:
    """Rewrites the predictions without a torn last line and with what other processes wrote beside them."""
    parts = sorted(file.parent.glob(f"{file.stem}.part*.jsonl"))
    predictions = read_predictions(file, records)
    for part in parts:
        predictions |= read_predictions(part, records)
    if file.exists() or parts:
        with atomic_write(file) as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions.values())
    for part in parts:
        part.unlink()


def answer_all(answerer: Answerer, records: list[dict], folder: Path, answered: set[str], file: Path, todo: int,
               show: bool) -> None:
    """Appends the answers to `file`, each on the disk's side of this process as soon as it is known."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream, progress(
            description=f"{records[0]['suite']} questions", total=todo, enabled=show) as bar:
        for record, answer in answerer.answers(records, folder, answered):
            stream.write(json.dumps({**record, "answer": answer}, ensure_ascii=False) + "\n")
            stream.flush()
            bar.update()
        os.fsync(stream.fileno())


def score_all(config: EvalConfig, questions: dict[str, tuple[list[dict], dict[str, str]]]) -> dict:
    """Reads the predictions, writes scores.json and summary.md."""
    scores: dict = {"model": config.model, "rule": config.rule, "batch_size": config.batch_size,
                    "max_new_tokens": config.max_new_tokens, "prompt_suffix": config.prompt_suffix,
                    "limit": config.limit, "suites": {}}
    for suite, (records, hashes) in questions.items():
        file = predictions_file(config, suite)
        merge_parts(file, records)
        predictions = read_predictions(file, records)
        unanswered = [record["id"] for record in records if record["id"] not in predictions]
        if unanswered:
            raise UserError(f"{file} lacks {len(unanswered)} answers, the first for question {unanswered[0]}; "
                            "run the same command again")
        rows = [predictions[record["id"]] for record in records]
        scores["suites"][suite] = report(suite, rows, config.rule, hashes, config.seed)
    output = Path(config.output_dir)
    write_json(output / "scores.json", scores)
    write_summary(output / "summary.md", scores)
    return scores


if __name__ == "__main__":
    run_program(main, EvalConfig, "python -m eval_vlm.run")
