"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218): blind people's questions about their own photographs.

Val is scored here; of test the answers lie with the server (EvalAI), `write_submission` makes its file. Files: the
official `val.json` or `test.json`, LLaVA's `llava_test.jsonl`, or lmms-lab/VizWiz-VQA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, write_json
from eval_vlm.config import VizwizConfig
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
from eval_vlm.suites.questions import check_records, first_pictures, read_rows
from eval_vlm.suites.vqa import (
    annotator_answers,
    from_sheet,
    normalise,
    normalise_textvqa,
    normalise_vlmevalkit,
    vqa_accuracy,
)
from eval_vlm.suites.vqav2 import parse as parse_vqav2

# official_after_llava_convert: as in VQAv2, and what LLaVA publishes. vqa_rule: VQAv2's script on these records.
RULES = ("official", "official_after_llava_convert", "vqa_rule", "lmms_eval", "vlmevalkit")
SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER


def load(config: VizwizConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a picture twice.
    """
    rows, sha256 = read_rows(config.questions, ("image",), config.image_folder, config.split)
    records = []
    for number, row in enumerate(rows):
        if "question" not in row and "text" not in row:
            raise UserError(f"{config.questions}, row {number + 1}: no question; name VizWiz's own file")
        question = row["question"] if "question" in row else row["text"].removesuffix(SUFFIX)
        question_id = row.get("question_id", number)
        # The submission names the picture as the release does; a dataset's own picture has another name here.
        name = f"{question_id}.jpg" if str(question_id).startswith("VizWiz") else row["image"]
        answer_type = row.get("answer_type") or row.get("category")
        records.append({"id": str(question_id), "suite": "vizwiz", "category": answer_type or "default",
                        "image": row["image"], "question_id": question_id, "question": question,
                        "answers": annotator_answers(row.get("answers"), f"{config.questions}, question {question_id}"),
                        "picture": name, "answer_type": answer_type})
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    return record["question"].capitalize() + (SUFFIX if suffix is None else suffix)


def parse(record: dict, rule: str = "official") -> dict[str, Any]:
    """The text that is compared and what it earns: `accuracy` in percent, the toolkits' `score` of 1.

    official normalises the model's answer and not the annotators', so that `Two` among them can never be met.
    """
    check_rule(rule, RULES)
    if rule == "vqa_rule":
        parsed = parse_vqav2(record, "official")
        return {"normalised": parsed["normalised"], "accuracy": parsed["accuracy"]}
    if rule in ("lmms_eval", "vlmevalkit"):
        rewrite = normalise_textvqa if rule == "lmms_eval" else normalise_vlmevalkit
        answer = rewrite(record["answer"])
        return {"normalised" if rule == "lmms_eval" else "prediction": answer,
                "score": vqa_accuracy(answer, [rewrite(one) for one in record["answers"]])}
    submitted = record["answer"] if rule == "official" else normalise_textvqa(record["answer"])
    answer = normalise(submitted)
    parsed = {"normalised": answer, "accuracy": 100 * vqa_accuracy(answer, record["answers"])}
    return parsed | ({} if rule == "official" else {"submitted": submitted})


def _values(rows: list[dict], rule: str, sheet: bool = True) -> list[float]:
    name = "score" if rule in ("lmms_eval", "vlmevalkit") else "accuracy"
    read = from_sheet if rule == "vlmevalkit" and sheet else str
    return [0.0 if row["answer"] is None else parse({**row, "answer": read(row["answer"])}, rule)[name] for row in rows]


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """`overall` and `perAnswerType` in percent; lmms_eval `exact_match` of 1; vlmevalkit `Overall` in percent, also
    without its sheet."""
    check_rule(rule, RULES)
    rows, warnings = last_answers(records)
    if not has_labels(rows, "answers"):
        return NO_LABELS
    warnings += count_missing(rows)
    values = _values(rows, rule)
    if rule == "lmms_eval":
        return with_warnings({"exact_match": mean(values)}, warnings)
    if rule == "vlmevalkit":
        return with_warnings({"Overall": mean(values, 100),
                              "Overall_without_sheet": mean(_values(rows, rule, sheet=False), 100)}, warnings)
    kinds = dict.fromkeys(row["answer_type"] for row in rows)
    return with_warnings({"overall": mean(values), "perAnswerType": {
        kind: mean([value for row, value in zip(rows, values, strict=True) if row["answer_type"] == kind])
        for kind in kinds}}, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = last_answers(records)[0]
    unit = 100 if rule in ("lmms_eval", "vlmevalkit") else 1
    return {"overall": to_points(rows, [unit * value for value in _values(rows, rule)])} \
        if has_labels(rows, "answers") else {}


def write_submission(records: list[dict], file: str | Path) -> None:
    """EvalAI's JSON, normalised as LLaVA's converter does."""
    write_json(file, [{"image": row["picture"], "answer": normalise_textvqa(row["answer"] or "")}
                      for row in last_answers(records)[0]])
