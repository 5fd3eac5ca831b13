"""LLaVA-Bench in the wild (Liu et al. 2023, arXiv 2304.08485): 60 open questions about 24 pictures, seen by a judge.

The judge is another program: eval_vlm.judge, or LLaVA's `eval_gpt_review_bench.py`, which reads the answers file that
`write_submission` makes. Their reviews (JSON lines with `tuple`: the reference's and the model's points) are scored as
a predictions file. Files: `questions.jsonl`, or lmms-lab/llava-bench-in-the-wild.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, atomic_write
from eval_vlm.config import LlavaBenchConfig
from eval_vlm.suites import (
    Points,
    check_rule,
    last_answers,
    mean,
    to_points,
    with_warnings,
)
from eval_vlm.suites.questions import check_records, first_pictures, is_dataset, read_rows

RULES = ("official",)
CATEGORIES = ("conv", "detail", "complex")
SUBMISSION = ".jsonl"


def load(config: LlavaBenchConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a question twice, a category that LLaVA-Bench does not have.
    """
    rows, sha256 = read_rows(config.questions, ("question_id", "image", "category"), config.image_folder, config.split)
    records = []
    for number, row in enumerate(rows, 1):
        text = row.get("question" if is_dataset(config.questions) else "text")
        if text is None or row["category"] not in CATEGORIES:
            raise UserError(f"{config.questions}, row {number}: a row needs a question and one of the categories "
                            f"{', '.join(CATEGORIES)}, found {row['category']!r}")
        records.append({"id": str(row["question_id"]), "suite": "llava_bench", "category": row["category"],
                        "image": row["image"], "question_id": row["question_id"], "question": text, "label": None})
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    return record["question"] + (suffix or "")


def parse(record: dict, rule: str = "official") -> list[float] | None:
    """The judge's points (of 10) for the reference's and the model's answer; None without.

    Raises:
        UserError: not two numbers.
    """
    check_rule(rule, RULES)
    grade = record.get("grade")
    numbers = isinstance(grade, list) and len(grade) == 2 and all(isinstance(one, int | float) for one in grade)
    if grade is not None and not numbers:
        raise UserError(f"question {record['question_id']}: a review has two numbers, the reference's and the model's "
                        f"points, found {grade!r}")
    return grade


def _reviewed(records: list[dict]) -> tuple[list[dict], list[str]]:
    rows, warnings = last_answers(records)
    chosen = [row for row in rows if parse(row) is not None]
    if chosen and len(chosen) < len(rows):
        warnings.append(f"{len(rows) - len(chosen)} of {len(rows)} questions have no review and are left out")
    return chosen, warnings


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """`all` and each category: `relative`, the published figure (the model's mean points, rounded to three places as
    the script does, in percent of the reference's), and both means x 10. The script prints one place."""
    check_rule(rule, RULES)
    rows, warnings = _reviewed(records)
    if not rows:
        return {"warn": "no figures: LLaVA-Bench's answers are compared by a judge; run eval_vlm.judge "
                "(docs/judge.md)"}
    figures = {}
    for name in ("all", *CATEGORIES):
        chosen = [parse(row) for row in rows if name in ("all", row["category"])]
        if chosen:
            reference, model = (round(mean([one[side] for one in chosen]), 3) for side in (0, 1))
            figures[name] = {"relative": 100 * model / reference if reference else None, "reference": 10 * reference,
                             "model": 10 * model}
    return with_warnings(figures, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    """The model's points x 10."""
    rows = _reviewed(records)[0]
    return {"model": to_points(rows, [10 * parse(row)[1] for row in rows])} if rows else {}


def write_submission(records: list[dict], file: str | Path) -> None:
    """The answers file that LLaVA's review script reads, in the questions' order."""
    with atomic_write(file) as stream:
        for row in last_answers(records)[0]:
            stream.write(json.dumps({"question_id": row["question_id"], "prompt": row["question"],
                                     "text": row["answer"] or "", "answer_id": row["id"], "model_id": "",
                                     "metadata": {}}, ensure_ascii=False) + "\n")
