"""SEED-Bench (Li et al. 2023, arXiv 2307.16125): four choices; nine kinds of questions on pictures, three on videos.

Files: `SEED-Bench.json`, or lmms-lab/SEED-Bench. Official here is LLaVA's scorer, which compares letters; SEED-Bench's
own ranks the choices by the model's loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, atomic_write
from eval_vlm.config import SeedbenchConfig
from eval_vlm.suites import (
    NO_LABELS,
    OPTION_LETTER,
    Points,
    check_rule,
    count_missing,
    has_labels,
    last_answers,
    mean,
    to_points,
    with_warnings,
)
from eval_vlm.suites.choices import vlmevalkit_letter
from eval_vlm.suites.questions import (
    check_fields,
    check_records,
    first_pictures,
    hash_files,
    is_dataset,
    option_letter,
    read_json,
    read_rows,
    with_options,
)

KINDS = dict(enumerate(("Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location",
                        "Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning",
                        "Text Understanding", "Action Recognition", "Action Prediction", "Procedure Understanding"), 1))
FIELDS = ("question_id", "data_type", "question_type_id", "question", "choice_a", "choice_b", "choice_c", "choice_d",
          "answer")
SUBMISSION = ".jsonl"


def load(config: SeedbenchConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a question twice, a label outside A to D.
    """
    kinds = {str(number): name for number, name in KINDS.items()}
    if is_dataset(config.questions):
        rows, sha256 = read_rows(config.questions, FIELDS, config.image_folder, config.split)
    else:
        content, sha256 = read_json(config.questions), hash_files(config.questions)
        if not isinstance(content, dict) or not isinstance(content.get("question_type"), dict):
            raise UserError(f"{config.questions} has no `question_type`; name SEED-Bench.json")
        kinds = {str(number): name for name, number in content["question_type"].items()}
        rows = content.get("questions")
        check_fields(rows, (*FIELDS, "data_id"), config.questions)
    records = []
    for row in rows:
        if row["data_type"] != "image" and config.images_only:
            continue
        # As LLaVA lays the pictures out; of a video it takes the middle frame.
        picture = row.get("image") or (f"SEED-Bench-image/{row['data_id']}" if row["data_type"] == "image" else
                                       f"SEED-Bench-video-image/{row['question_id']}.png")
        number = str(row["question_type_id"])
        if not number.isdigit():
            raise UserError(f"{config.questions}, question {row['question_id']}: question_type_id must be a number, "
                            f"found {number!r}; get the file again")
        records.append({"id": str(row["question_id"]), "suite": "seedbench",
                        "category": kinds.get(number, f"type {number}"), "image": picture,
                        "question_id": row["question_id"], "data_type": row["data_type"],
                        "question_type_id": row["question_type_id"], "question": row["question"],
                        **{f"choice_{one}": row[f"choice_{one}"] for one in "abcd"},
                        "label": option_letter(row["answer"], 4, f"{config.questions}, question {row['question_id']}")})
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def _choices(record: dict) -> dict[str, str]:
    return {letter: record[f"choice_{letter.lower()}"] for letter in "ABCD"}


def prompt(record: dict, suffix: str | None = None) -> str:
    return with_options(record["question"], _choices(record)) + (OPTION_LETTER if suffix is None else suffix)


def parse(record: dict, rule: str = "official") -> Any:
    """official: `{"correct"}`: the answer is the letter, character by character. lmms_eval: the first character of the
    stripped answer (`Apple` is A). vlmevalkit: `{"letter", "hit"}`."""
    check_rule(rule)
    if rule == "official":
        return {"correct": record["answer"] == record["label"]}
    if rule == "lmms_eval":
        return record["answer"].strip()[:1]
    letter = vlmevalkit_letter(record["answer"], _choices(record)) or "Z"
    return {"letter": letter, "hit": int(letter == record["label"])}


def _right(row: dict, rule: str) -> float:
    if row["answer"] is None:
        return 0.0
    parsed = parse(row, rule)
    if rule == "lmms_eval":
        return float(parsed.lower() == row["label"].lower())
    return float(parsed["correct" if rule == "official" else "hit"])


def _sets(rows: list[dict]) -> dict[str, list[dict]]:
    return {"all": rows, **{kind: [row for row in rows if row["data_type"] == kind] for kind in ("image", "video")}}


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """official: `all`, `image`, `video` and `types`, each `{"questions", "correct", "accuracy"}` (percent). lmms_eval
    `seed_*` and vlmevalkit `all`, `image` of 1."""
    check_rule(rule)
    rows, warnings = last_answers(records)
    if not has_labels(rows):
        return NO_LABELS
    warnings += count_missing(rows)
    sets = {name: [_right(row, rule) for row in chosen] for name, chosen in _sets(rows).items()}
    if rule == "vlmevalkit":
        return with_warnings({name: mean(sets[name]) for name in ("all", "image")}, warnings)
    warnings += [f"no {name} question" for name in ("image", "video") if not sets[name]]
    if rule == "lmms_eval":
        return with_warnings({f"seed_{name}": mean(right) for name, right in sets.items()}, warnings)

    def figures(right: list[float]) -> dict[str, Any]:
        return {"questions": len(right), "correct": int(sum(right)), "accuracy": mean(right, 100)}

    kinds = sorted({(int(row["question_type_id"]), _kind(row)) for row in rows})
    types = {name: figures([_right(row, rule) for row in rows if _kind(row) == name]) for _, name in kinds}
    return with_warnings({**{name: figures(right) for name, right in sets.items()}, "types": types}, warnings)


def _kind(row: dict) -> str:
    return row.get("category") or KINDS.get(int(row["question_type_id"]), f"type {row['question_type_id']}")


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = last_answers(records)[0]
    if not has_labels(rows):
        return {}
    kinds = {kind: [row for row in rows if _kind(row) == kind] for kind in dict.fromkeys(map(_kind, rows))}
    return {name: to_points(chosen, [100 * _right(row, rule) for row in chosen])
            for name, chosen in (_sets(rows) | kinds).items() if chosen}


def write_submission(records: list[dict], file: str | Path) -> None:
    """The leaderboard's JSON lines."""
    with atomic_write(file) as stream:
        for row in last_answers(records)[0]:
            stream.write(json.dumps({"question_id": row["question_id"], "prediction": row["answer"] or ""}) + "\n")
