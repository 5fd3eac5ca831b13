"""TextVQA (Singh et al. 2019, arXiv 1904.08920): questions that need the text in the picture, ten annotators each.

LLaVA's published figure is made with OCR tokens in the prompt (`ocr_tokens`). Files: `TextVQA_0.5.1_val.json`, or
lmms-lab/textvqa; tokens from LLaVA's `llava_textvqa_val_v051_ocr.jsonl`, Rosetta's JSON, or the dataset's column.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, read_jsonl, write_json
from eval_vlm.config import TextvqaConfig
from eval_vlm.suites import (
    NO_LABELS,
    SHORT_ANSWER,
    Points,
    check_rule,
    count_missing,
    has_labels,
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
from eval_vlm.suites.vqa import annotator_answers, from_sheet, normalise_textvqa, normalise_vlmevalkit, vqa_accuracy

RULES = ("official", "lmms_eval", "vlmevalkit")
OCR = "\nReference OCR token: "


def load(config: TextvqaConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Records; their `question_id` is the picture's id, as in LLaVA's answer files.

    Raises:
        UserError: a broken or wrong file, a question twice, OCR tokens missing.
    """
    if is_dataset(config.questions):
        rows, sha256 = read_rows(config.questions, ("question_id", "image_id", "question"), config.image_folder,
                                 config.split)
    else:
        content = read_json(config.questions)
        if not isinstance(content, dict) or not content.get("data"):
            raise UserError(f"{config.questions}: no list `data`; name TextVQA_0.5.1_val.json")
        check_fields(content["data"], ("question_id", "image_id", "question"), config.questions)
        rows = [{"image": f"{row['image_id']}.jpg", **row} for row in content["data"]]
        sha256 = hash_files(config.questions)
    tokens = _ocr_tokens(config, rows)
    records = [{"id": str(row["question_id"]), "suite": "textvqa", "category": "default", "image": row["image"],
                "question_id": row["image_id"], "question": row["question"],
                "answers": annotator_answers(row.get("answers"), f"{config.questions}, question {row['question_id']}"),
                "ocr_tokens": one} for row, one in zip(rows, tokens, strict=True)]
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def _ocr_tokens(config: TextvqaConfig, rows: list[dict]) -> list[str | None]:
    """Each question's OCR tokens as they stand in the prompt; None without."""
    if not config.ocr_tokens:
        return [None] * len(rows)
    if config.ocr_tokens == "column":
        if any("ocr_tokens" not in row for row in rows):
            raise UserError(f"{config.questions} has no column ocr_tokens; name a file in textvqa.ocr_tokens")
        return [", ".join(map(str, row["ocr_tokens"])) for row in rows]
    if Path(config.ocr_tokens).suffix == ".jsonl":  # LLaVA's prompts
        prompts = read_jsonl(config.ocr_tokens)
        check_fields(prompts, ("question_id", "text"), config.ocr_tokens)
        found = {str(row["question_id"]): row["text"].partition(OCR)[2].removesuffix(SHORT_ANSWER) for row in prompts}
    else:
        content = read_json(config.ocr_tokens)
        content = content.get("data") if isinstance(content, dict) else content
        check_fields(content, ("image_id", "ocr_tokens"), config.ocr_tokens)
        found = {row["image_id"]: ", ".join(map(str, row["ocr_tokens"])) for row in content}
    missing = [row["image_id"] for row in rows if row["image_id"] not in found]
    if missing:
        raise UserError(f"{config.ocr_tokens} has no tokens of picture {missing[0]} ({len(missing)} questions are "
                        f"without them); name the file that belongs to {config.questions}")
    return [found[row["image_id"]] for row in rows]


def prompt(record: dict, suffix: str | None = None) -> str:
    tokens = "" if record["ocr_tokens"] is None else OCR + record["ocr_tokens"]
    return record["question"].capitalize() + tokens + (SHORT_ANSWER if suffix is None else suffix)


def parse(record: dict, rule: str = "official") -> dict[str, Any]:
    """The text that is compared (`normalised`; vlmevalkit `prediction`) and what it earns (`score`, of 1).

    Raises:
        UserError: not ten annotators (official).
    """
    check_rule(rule, RULES)
    if rule == "official" and len(record["answers"]) != 10:
        raise UserError(f"TextVQA needs ten answers, question {record['question_id']} '{record['question']}' has "
                        f"{len(record['answers'])}; correct the question file")
    rewrite = normalise_vlmevalkit if rule == "vlmevalkit" else normalise_textvqa
    answer = rewrite(record["answer"])
    return {"prediction" if rule == "vlmevalkit" else "normalised": answer,
            "score": vqa_accuracy(answer, [rewrite(one) for one in record["answers"]])}


def _answered_once(records: list[dict]) -> tuple[list[dict], list[str]]:
    return last_answers(records, lambda record: (str(record["question_id"]), record["question"].lower()))


def _values(rows: list[dict], rule: str, sheet: bool = True) -> list[float]:
    read = from_sheet if rule == "vlmevalkit" and sheet else str
    return [0.0 if row["answer"] is None else parse({**row, "answer": read(row["answer"])}, rule)["score"]
            for row in rows]


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """`samples` and `accuracy` of 1; lmms_eval `exact_match`; vlmevalkit `Overall` in percent, also without its sheet.
    """
    check_rule(rule, RULES)
    rows, warnings = _answered_once(records)
    if not has_labels(rows, "answers"):
        return NO_LABELS
    warnings += count_missing(rows)
    accuracy = mean(_values(rows, rule))
    if rule == "lmms_eval":
        return with_warnings({"exact_match": accuracy}, warnings)
    if rule == "vlmevalkit":
        return with_warnings({"Overall": 100 * accuracy,
                              "Overall_without_sheet": mean(_values(rows, rule, sheet=False), 100)}, warnings)
    return with_warnings({"samples": len(rows), "accuracy": accuracy}, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = _answered_once(records)[0]
    return {"accuracy": to_points(rows, [100 * value for value in _values(rows, rule)])} \
        if has_labels(rows, "answers") else {}


def write_submission(records: list[dict], file: str | Path) -> None:
    """EvalAI's JSON."""
    write_json(file, [{"question_id": int(row["id"]) if row["id"].isdigit() else row["id"],
                       "answer": normalise_textvqa(row["answer"] or "")} for row in _answered_once(records)[0]])
