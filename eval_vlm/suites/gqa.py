"""GQA (Hudson and Manning 2019, arXiv 1902.09506), testdev_balanced: compositional questions, one short answer each.

Files: `testdev_balanced_questions.json`, or lmms-lab/GQA (its pictures are a dataset of their own, `images`). LLaVA's
own `llava_gqa_testdev_balanced.jsonl` holds the same questions without answers and is not needed.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, write_json
from eval_vlm.config import GqaConfig
from eval_vlm.suites import (
    NO_LABELS,
    SHORT_ANSWER,
    Points,
    check_rule,
    has_labels,
    last_answers,
    mean,
    to_points,
    with_warnings,
)
from eval_vlm.suites.questions import (
    check_fields,
    check_records,
    dataset_rows,
    first_pictures,
    hash_files,
    is_dataset,
    read_json,
    read_rows,
    store,
)
from eval_vlm.suites.vqa import from_sheet


def load(config: GqaConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a question twice or without its annotations.
    """
    if is_dataset(config.questions):
        rows, sha256 = read_rows(config.questions, ("id",), split=config.split, subset=config.subset)
        if config.images and config.image_folder:
            for row in dataset_rows(config.images, config.split, config.subset.replace("instructions", "images")):
                store(row["image"]["bytes"], config.image_folder, f"{row['id']}.jpg")
    else:
        content, sha256 = read_json(config.questions), hash_files(config.questions)
        if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
            raise UserError(f"{config.questions} is no JSON object of questions; name testdev_balanced_questions.json")
        rows = [{"id": question_id, **row} for question_id, row in content.items()]
    check_fields(rows, ("imageId", "question", "answer", "isBalanced", "types", "groups", "semantic"), config.questions)
    for row in rows:
        steps = all(isinstance(one, dict) and {"operation", "argument"} <= one.keys() for one in row["semantic"])
        kinds = all(isinstance(row["types"].get(kind), str) for kind in ("structural", "semantic"))
        texts = all(isinstance(one, str | None) for one in (row["answer"], row["groups"].get("global")))
        if not (steps and kinds and texts):
            raise UserError(f"{config.questions}, question {row['id']}: its answer, types, groups or semantic is not "
                            "as in GQA; get the file again")
    records = [{"id": str(row["id"]), "suite": "gqa", "category": row["types"]["structural"],
                "image": f"{row['imageId']}.jpg", "question_id": str(row["id"]), "question": row["question"],
                "label": row["answer"], "isBalanced": row["isBalanced"], "types": row["types"],
                "groups": row["groups"], "semantic": row["semantic"]} for row in rows]
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    return record["question"] + (SHORT_ANSWER if suffix is None else suffix)


def parse(record: dict, rule: str = "official") -> Any:
    """official: `{"prediction", "correct"}`: full stops cut at the end, lower case, against the label as it is.
    lmms_eval: 1 or 0, stripped, without case and punctuation. vlmevalkit: 1 or 0, stripped, without case."""
    check_rule(rule)
    answer, label = record["answer"], record["label"]
    if rule == "official":
        prediction = answer.rstrip(".").lower()
        return {"prediction": prediction, "correct": prediction == label}
    if rule == "lmms_eval":
        without = str.maketrans("", "", string.punctuation)
        return float(answer.strip().lower().translate(without) == label.lower().translate(without))
    return float(answer.strip().lower() == label.strip().lower())


def _balanced(records: list[dict]) -> tuple[list[dict], list[str]]:
    """Only balanced questions count."""
    return last_answers(record for record in records if record["isBalanced"])


def _values(rows: list[dict], rule: str, sheet: bool = True) -> list[float]:
    """1 or 0 of each row."""
    read = from_sheet if rule == "vlmevalkit" and sheet else str
    parsed = [None if row["answer"] is None else parse({**row, "answer": read(row["answer"])}, rule) for row in rows]
    return [float(one["correct"]) if isinstance(one, dict) else one or 0.0 for one in parsed]


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """official: the script's figures in percent (of types, steps and lengths with the number of questions); `validity`
    and `plausibility` are 0 without a choices file, `distribution` (lower is better) None without a global group.
    lmms_eval `exact_match` of 1; vlmevalkit `Overall` in percent, also without its sheet."""
    check_rule(rule)
    rows, warnings = _balanced(records)
    if not has_labels(rows):
        return NO_LABELS
    missing = sum(row["answer"] is None for row in rows)
    if missing:
        warnings.append(f"{missing} {'question has' if missing == 1 else 'questions have'} no answer, counted as wrong")
    values = _values(rows, rule)
    if rule == "lmms_eval":
        return with_warnings({"exact_match": mean(values)}, warnings)
    if rule == "vlmevalkit":
        return with_warnings({"Overall": mean(values, 100),
                              "Overall_without_sheet": mean(_values(rows, rule, sheet=False), 100)}, warnings)
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    halves: dict[str, list[float]] = {"binary": [], "open": []}
    for row, value in zip(rows, values, strict=True):
        structural = row["types"]["structural"]
        halves["open" if structural == "query" else "binary"].append(value)
        kinds["accuracyPerStructuralType"][structural].append(value)
        kinds["accuracyPerSemanticType"][row["types"]["semantic"]].append(value)
        kinds["accuracyPerSteps"][str(_steps(row))].append(value)
        kinds["accuracyPerLength"][str(len(row["question"].split()))].append(value)
    distribution = _distribution(rows)
    if distribution is None:
        warnings.append("no distribution: no question with a global group")
    warnings += [f"no {name} question" for name, half in halves.items() if not half]
    figures = {"accuracy": mean(values, 100), **{name: mean(half, 100) for name, half in halves.items()},
               "validity": 0.0, "plausibility": 0.0, "distribution": distribution,
               **{name: {kind: [mean(one, 100), len(one)] for kind, one in by_kind.items()}
                  for name, by_kind in kinds.items()}}
    return with_warnings(figures, warnings)


def _steps(row: dict) -> int:
    """Reasoning steps: semantic operations but those that only ask."""
    asking = ("exist", "query: name", "choose name")
    operations = [f"{one['operation']}: {one['argument']}" for one in row["semantic"]]
    return sum(not any(word in operation for word in asking) for operation in operations)


def _distribution(rows: list[dict]) -> float | None:
    """Chi-square of the answers against the labels per global group, averaged by the groups' sizes, / 100."""
    labels: dict[str, Counter] = defaultdict(Counter)
    answers: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        group = row["groups"].get("global")
        if group is not None:
            labels[group][row["label"]] += 1
            if row["answer"] is not None:
                answers[group][parse(row)["prediction"]] += 1
    size = sum(sum(group.values()) for group in labels.values())
    total = sum(sum((answers[name][label] - count) ** 2 / count for label, count in group.items()) * sum(group.values())
                for name, group in labels.items())
    return total / size / 100 if size else None


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = _balanced(records)[0]
    return {"accuracy": to_points(rows, [100 * value for value in _values(rows, rule)])} if has_labels(rows) else {}


def write_submission(records: list[dict], file: str | Path) -> None:
    """What GQA's eval.py and its server read, cut as LLaVA's converter does."""
    rows = last_answers(records)[0]
    write_json(file, [{"questionId": row["question_id"], "prediction": (row["answer"] or "").rstrip(".").lower()}
                      for row in rows])
