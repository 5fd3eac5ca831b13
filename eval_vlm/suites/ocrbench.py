"""OCRBench (Liu et al. 2023, arXiv 2305.07895): 1,000 questions about text in pictures, scored by containment.

Files: `OCRBench.json` with its pictures, or echo840/OCRBench. Asked without a suffix, as its own script does.
"""

from __future__ import annotations

from typing import Any

from clipmoe_vlm.runs import UserError
from eval_vlm.config import OcrbenchConfig
from eval_vlm.suites import (
    NO_LABELS,
    Points,
    check_rule,
    count_missing,
    has_labels,
    last_answers,
    to_points,
    with_warnings,
)
from eval_vlm.suites.questions import check_records, first_pictures, is_dataset, read_rows

RECOGNITION = ("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition",
               "Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition")
FORMULAE = "Handwritten Mathematical Expression Recognition"
OTHERS = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAE)
FULL_WIDTH = {**{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0x3000: " "}


def load(config: OcrbenchConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a question twice, a kind of question that OCRBench does not have.
    """
    if is_dataset(config.questions):
        rows, sha256 = read_rows(config.questions, ("question", "question_type", "answer", "image"),
                                 config.image_folder, config.split)
        rows = [{"id": number, **row} for number, row in enumerate(rows)]
    else:
        rows, sha256 = read_rows(config.questions, ("question", "type", "answers", "image_path", "id"))
        rows = [{**row, "question_type": row["type"], "answer": row["answers"], "image": row["image_path"]}
                for row in rows]
    records = []
    for row in rows:
        if row["question_type"] not in (*RECOGNITION, *OTHERS):
            raise UserError(f"{config.questions}, question {row['id']}: OCRBench has no kind '{row['question_type']}'; "
                            f"its kinds are {', '.join((*RECOGNITION, *OTHERS))}")
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        records.append({"id": str(row["id"]), "suite": "ocrbench", "category": row["question_type"],
                        "image": row["image"], "question_id": row["id"], "question": row["question"].strip(),
                        "answers": None if row["answer"] is None else [str(answer) for answer in answers]})
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    return record["question"] + (suffix or "")


def parse(record: dict, rule: str = "official") -> int:
    """1 if one of the right texts is in the answer, whatever the case (formulae: with case, without blanks).

    lmms_eval also takes full-width letters and marks for the plain ones.
    """
    check_rule(rule)

    def plain(text: str) -> str:
        if record["category"] == FORMULAE:
            return text.strip().replace("\n", " ").replace(" ", "")
        if rule == "lmms_eval":
            text = text.translate(FULL_WIDTH)
        return text.lower().strip().replace("\n", " ")

    return int(any(plain(text) in plain(record["answer"]) for text in record["answers"]))


def _values(rows: list[dict], rule: str) -> list[int]:
    return [0 if row["answer"] is None else parse(row, rule) for row in rows]


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """Numbers of right answers: five parts, their sum `Final Score` (of 1000) and a tenth of it, `Final Score Norm`.
    lmms_eval: `ocrbench_accuracy`, the sum / 1000."""
    check_rule(rule)
    rows, warnings = last_answers(records)
    if not has_labels(rows, "answers"):
        return NO_LABELS
    warnings += count_missing(rows)
    values = _values(rows, rule)
    parts = {"Text Recognition": RECOGNITION, **{name: (name,) for name in OTHERS}}
    figures: dict[str, Any] = {
        name: sum(value for row, value in zip(rows, values, strict=True) if row["category"] in kinds)
        for name, kinds in parts.items()}
    if len(rows) != 1000:
        warnings.append(f"{len(rows)} of OCRBench's 1000 questions: the sum is of {len(rows)}")
    if rule == "lmms_eval":
        return with_warnings({"ocrbench_accuracy": sum(values) / 1000}, warnings)
    return with_warnings({**figures, "Final Score": sum(values), "Final Score Norm": sum(values) / 10}, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = last_answers(records)[0]
    if not has_labels(rows, "answers"):
        return {}
    return {"all": to_points(rows, [100.0 * value for value in _values(rows, rule)])}
