"""MM-Vet (Yu et al. 2023, arXiv 2308.02490): 218 open questions, each needing some of six abilities, graded by a judge.

The judge is another program: eval_vlm.judge, whose grades are scored as a predictions file, or MM-Vet's own, which
reads the answers file that `write_submission` makes and writes `{"v1_0": {"score": [0.5]}, ...}`. Files:
`mm-vet.json`, or lmms-lab/MMVet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, write_json
from eval_vlm.config import MmvetConfig
from eval_vlm.suites import (
    Points,
    check_rule,
    last_answers,
    mean,
    to_points,
    with_warnings,
)
from eval_vlm.suites.questions import (
    check_fields,
    check_records,
    first_pictures,
    hash_files,
    is_dataset,
    read_json,
    read_rows,
)

RULES = ("official",)
ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def load(config: MmvetConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a question twice, an ability that MM-Vet does not have.
    """
    if is_dataset(config.questions):
        rows, sha256 = read_rows(config.questions, ("question_id", "question", "answer", "capability", "image"),
                                 config.image_folder, config.split)
    else:
        content, sha256 = read_json(config.questions), hash_files(config.questions)
        if not isinstance(content, dict):
            raise UserError(f"{config.questions} is no JSON object of MM-Vet's questions; name mm-vet.json")
        check_fields(list(content.values()), ("imagename", "question", "answer", "capability"), config.questions)
        rows = [{"question_id": name, "image": row["imagename"], **row} for name, row in content.items()]
    records = []
    for row in rows:
        abilities = row["capability"].split(",") if isinstance(row["capability"], str) else row["capability"]
        unknown = [one for one in abilities if str(one).strip() not in ABILITIES]
        if unknown:
            raise UserError(f"{config.questions}, question {row['question_id']}: MM-Vet has no ability '{unknown[0]}'; "
                            f"its abilities are {', '.join(ABILITIES)}")
        name = str(row["question_id"])
        records.append({"id": name, "suite": "mmvet", "category": "default", "image": row["image"], "question_id": name,
                        "llava_id": name.removeprefix("v1_"), "question": row["question"], "label": row["answer"],
                        "abilities": [one.strip() for one in abilities]})
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    return record["question"] + (suffix or "")


def parse(record: dict, rule: str = "official") -> float | None:
    """The judge's grade of 1 (the mean of several), None without.

    Raises:
        UserError: a grade outside 0 to 1.
    """
    check_rule(rule, RULES)
    grades = record.get("grade")
    if grades is None:
        return None
    grades = grades if isinstance(grades, list) else [grades]
    if not all(isinstance(grade, int | float) and 0 <= grade <= 1 for grade in grades):
        raise UserError(f"question {record['question_id']}: MM-Vet's grades go from 0 to 1, found {record['grade']}")
    return mean(grades)


def _graded(records: list[dict]) -> tuple[list[dict], list[float], list[str]]:
    rows, warnings = last_answers(records)
    grades = [parse(row) for row in rows]
    chosen = [(row, grade) for row, grade in zip(rows, grades, strict=True) if grade is not None]
    if chosen and len(chosen) < len(rows):
        warnings.append(f"{len(rows) - len(chosen)} of {len(rows)} questions have no grade and are left out")
    return [row for row, _ in chosen], [grade for _, grade in chosen], warnings


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """`total` and each ability in percent, and each combination of abilities; the notebook rounds to one place."""
    check_rule(rule, RULES)
    rows, grades, warnings = _graded(records)
    if not rows:
        return {"warn": "no figures: MM-Vet's answers are graded by a judge; run eval_vlm.judge (docs/judge.md)"}
    pairs = list(zip(rows, grades, strict=True))
    combinations: dict[str, list[float]] = {}
    for row, grade in pairs:
        combinations.setdefault("_".join(one for one in ABILITIES if one in row["abilities"]), []).append(grade)
    return with_warnings({
        "total": mean(grades, 100),
        **{one: mean([grade for row, grade in pairs if one in row["abilities"]], 100) for one in ABILITIES},
        "combinations": {name: mean(one, 100) for name, one in combinations.items()}}, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows, grades, _ = _graded(records)
    return {"total": to_points(rows, [100 * grade for grade in grades])} if rows else {}


def write_submission(records: list[dict], file: str | Path) -> None:
    """What MM-Vet's notebook and Space read: `{"v1_0": answer, ...}`."""
    rows = last_answers(records)[0]
    write_json(file, {row["question_id"]: row["answer"] or "" for row in rows})
