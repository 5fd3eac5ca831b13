"""Scores a prediction file without a model: `python -m eval_vlm.score SUITE PREDICTIONS --questions FILE [--rule R]`.

PREDICTIONS: this program's `predictions/<suite>.jsonl`, LLaVA's answer files (`question_id`, `text`), or what a
benchmark's own server or script reads (`questionId`, `prediction`; `{"v1_0": "text"}`; ...). More options of a suite
are typed as `key=value` (docs/suites.md); `--output FILE` writes scores.json, `--submission FILE` the benchmark's own
file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from clipmoe_vlm.runs import UserError, fail, read_jsonl, write_json
from eval_vlm.config import SOURCE, SUITES, EvalConfig
from eval_vlm.report import with_interval
from eval_vlm.stats import scored
from eval_vlm.suites import check_rule, estimates, module, rules_of
from eval_vlm.suites.mmbench import ROTATION
from eval_vlm.suites.questions import hash_files, read_json

USAGE = ("python -m eval_vlm.score SUITE PREDICTIONS --questions FILE [--rule official] [--output scores.json] "
         "[--submission FILE] [key=value ...]")
ID_KEYS = ("question_id", "questionId", "index", "id", "image")
ANSWER_KEYS = ("answer", "text", "prediction")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {USAGE}; the suites are {', '.join(SUITES)}")


def apply_options(default: Any, options: list[str], name: str) -> Any:
    """The dataclass `default` with `key=value` options; `name` says in errors what it configures.

    Raises:
        UserError: a key that it does not have, or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for option in options:
        if "=" not in option or option.split("=")[0] not in vars(default):
            raise UserError(f"'{option}' is not of the form key=value with a key of {name}: "
                            f"{', '.join(vars(default))}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(default), OmegaConf.from_dotlist(options)))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error


def suite_config(suite: str, questions: str, options: list[str]) -> Any:
    """The suite's dataclass with its defaults, the question file and `key=value` options."""
    config = apply_options(getattr(EvalConfig(model="", output_dir=""), suite), options, suite)
    setattr(config, SOURCE[suite], questions)
    return config


def read_predictions(file: Path) -> list[dict]:
    """Rows of a prediction file, whatever its layout; `answer` is the text, `grade` what a judge gave.

    Raises:
        UserError: a broken file, a row without an answer or with one that is no text.
    """
    content = read_json(file) if file.suffix == ".json" else read_jsonl(file)
    if isinstance(content, dict):  # MM-Vet: question -> answer, or question -> grades
        content = [{"question_id": name, **(value if isinstance(value, dict) else {"text": value})}
                   for name, value in content.items()]
    if not isinstance(content, list) or not content:
        raise UserError(f"{file}: no predictions")
    rows = []
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: expected a JSON object, found {str(row)[:60]!r}")
        grade = row.get("tuple", row.get("score"))
        keys = [key for key in ANSWER_KEYS if key in row]
        if not keys and grade is None:
            raise UserError(f"{file}, row {number}: no answer (one of the fields {', '.join(ANSWER_KEYS)})")
        answer = row[keys[0]] if keys else ""
        if not isinstance(answer, str):
            raise UserError(f"{file}, row {number}: the answer must be text, found {answer!r}")
        rows.append({**row, "answer": answer, "grade": grade})
    return rows


def match(predictions: list[dict], records: list[dict], suite: str, file: Path, questions: str) -> list[dict]:
    """The records with their answers, one per prediction, then those without, whose answer is None.

    A prediction names its question by our `id`, or by the question's number or picture as LLaVA's and the benchmarks'
    own files do; where one number stands for several questions (TextVQA, MME), its `prompt` tells which.

    Raises:
        UserError: predictions of another suite, or for a question that is not among the records.
    """
    by_id = {record["id"]: record for record in records}
    by_name: dict[str, list[dict]] = {}
    for record in records:
        for name in {str(record["question_id"]), str(record.get("llava_id", record["question_id"])), record["image"],
                     record.get("picture", record["image"])}:
            by_name.setdefault(name, []).append(record)
    numbered = any("llava_id" in record for record in records)
    answered, seen = [], set()
    for number, row in enumerate(predictions, 1):
        where = f"{file}, row {number}"
        if "suite" in row:
            if row["suite"] != suite:
                raise UserError(f"{where} is a prediction for {row['suite']}, not for {suite}; name that suite")
            name = str(row.get("id"))
            found = [by_id[name]] if name in by_id else []
            found = [one for one in found if row.get("question", one["question"]) == one["question"]]
        else:
            name = next((row[key] for key in ID_KEYS if key in row), None)
            if suite in ("mmbench", "mmbench_cn") and row.get("round_id"):
                if not str(name).isdecimal() or not isinstance(row["round_id"], int):
                    raise UserError(f"{where}: question {name}, round_id {row['round_id']}: LLaVA has numbers there")
                name = int(name) + ROTATION * row["round_id"]
            found = by_name.get(str(name), [])
            if numbered and len(found) > 1:
                found = [one for one in found if one.get("llava_id") == str(name)] or found
            found = _narrow(found, row)
        if not found:
            raise UserError(f"{where} answers question {name}, which is not in {questions}; name the question file "
                            "that the predictions were made from")
        if len(found) > 1:
            hint = ", or put LLaVA's llava_pope_test.jsonl beside the question files" if suite == "pope" else ""
            raise UserError(f"{where}: question {name} is there {len(found)} times and the row does not tell which; "
                            f"give each row its `category`, `prompt` or our `id`{hint}")
        seen.add(found[0]["id"])
        answered.append({**found[0], "answer": row["answer"], "grade": row["grade"]})
    return answered + [{**record, "answer": None, "grade": None} for record in records if record["id"] not in seen]


def _narrow(found: list[dict], row: dict) -> list[dict]:
    """The candidates that the row's category and prompt name: the question is in the prompt, best as a whole line."""
    if len(found) > 1 and row.get("category") in {one["category"] for one in found}:
        found = [one for one in found if one["category"] == row["category"]]
    if isinstance(row.get("prompt"), str):
        lines = [_plain(line) for line in row["prompt"].split("\n")]
        found = [one for one in found if _plain(one["question"]) in _plain(row["prompt"])]
        found = [one for one in found if _plain(one["question"]) in lines] or found
    return found


def _plain(question: str) -> str:
    """Without case, line breaks and MME's request, which LLaVA's prompts lack."""
    return " ".join(question.lower().split()).removesuffix("please answer yes or no.").strip()


def score_file(suite: str, predictions: str, questions: str, rule: str = "official", options: list[str] | None = None
               ) -> tuple[dict[str, Any], list[dict]]:
    """The content of scores.json, and the records with their answers.

    Raises:
        UserError: an unknown suite, rule or option, broken files, predictions for other questions.
    """
    check_rule(rule, rules_of(suite))
    config = suite_config(suite, questions, options or [])
    records, hashes = module(suite).load(config)
    rows = match(read_predictions(Path(predictions)), records, suite, Path(predictions), questions)
    figures = module(suite).score(rows, rule)
    scorable = rows
    if suite == "mme":  # its figures name the subtasks that can't be scored
        broken = {task for task, one in figures["tasks"].items() if isinstance(one, dict) and "error" in one}
        scorable = [row for row in rows if row["category"] not in broken]
    return {"suite": suite, "rule": rule, "predictions": predictions, "predictions_sha256": hash_files(predictions),
            "questions": questions, "questions_sha256": hashes, "n": len(records),
            "answered": len({row["id"] for row in rows if row["answer"] is not None}),
            "scores": {name: scored(one) for name, one in estimates(suite, scorable, rule).items()},
            "figures": figures}, rows


def show(scores: dict[str, Any]) -> None:
    """Prints the report: what was scored by which rule, means with intervals, and the rule's own figures."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    hashes = ", ".join(f"{name} {digest}" for name, digest in scores["questions_sha256"].items())
    for name, text in (("suite", f"{scores['suite']}, rule {scores['rule']}"), ("predictions", scores["predictions"]),
                       ("questions", f"{scores['questions']} (N = {scores['n']}, answered {scores['answered']})"),
                       ("sha256", hashes)):
        console.print(f"{name}: {text}", markup=False, soft_wrap=True)
    if scores["scores"]:
        table = Table("set", "N", "pictures", "score [95%]")
        for name, one in scores["scores"].items():
            text = with_interval(one["score"], one["interval"], places=4 if scores["suite"] == "pope" else 2)
            table.add_row(*(escape(str(cell)) for cell in (name, one["n"], one["pictures"], text)))
        console.print(table)
    table = Table("figure", "value")
    for name, value in _flat(scores["figures"]):
        text = f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)
        table.add_row(escape(name), escape(text))
    if table.row_count:
        console.print(table)
    if scores["figures"].get("warn"):
        console.print(f"warning: {scores['figures']['warn']}", markup=False, soft_wrap=True)


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `[("a / b", 1)]`, without the warning."""
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} / ")
        elif name != "warn" or prefix:
            rows.append((f"{prefix}{name}", value[0] if isinstance(value, list) else value))
    return rows


def main(arguments: list[str]) -> None:
    parser = Parser(add_help=False)
    for name in ("suite", "predictions"):
        parser.add_argument(name)
    parser.add_argument("options", nargs="*")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--rule", default="official")
    for name in ("--output", "--submission"):
        parser.add_argument(name)
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.submission and not hasattr(module(chosen.suite), "write_submission"):
        raise UserError(f"{chosen.suite} has no submission file: it is scored here")
    scores, rows = score_file(chosen.suite, chosen.predictions, chosen.questions, chosen.rule, chosen.options)
    if chosen.submission:
        module(chosen.suite).write_submission(rows, chosen.submission)
    if chosen.output:
        write_json(chosen.output, scores)
    show(scores)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
