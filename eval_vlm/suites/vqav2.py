"""VQAv2 (Goyal et al. 2017, arXiv 1612.00837): open questions, ten annotators each.

Val is scored here; of test the answers lie with the server (EvalAI), `write_submission` makes its file. Files: the
official questions (and for val annotations) JSON, LLaVA's `llava_vqav2_mscoco_test-dev2015.jsonl`, or lmms-lab/VQAv2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, write_json
from eval_vlm.config import Vqav2Config
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
    first_pictures,
    hash_files,
    is_dataset,
    read_json,
    read_rows,
)
from eval_vlm.suites.vqa import (
    COMMA_EVALAI,
    annotator_answers,
    normalise,
    normalise_textvqa,
    vqa_accuracy,
    without_breaks,
)

# official_after_llava_convert: the answers go through LLaVA's converter (TextVQA's normalisation) first, as published.
RULES = ("official", "official_after_llava_convert", "lmms_eval")


def load(config: Vqav2Config, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a question twice, an annotation missing.
    """
    files = [config.questions]
    if Path(config.questions).suffix == ".json":
        content = read_json(config.questions)
        if not isinstance(content, dict) or "questions" not in content:
            raise UserError(f"{config.questions}: no list `questions`; name VQAv2's "
                            "v2_OpenEnded_mscoco_..._questions.json")
        check_fields(content["questions"], ("question_id", "image_id", "question"), config.questions)
        rows = [{"image": f"COCO_{content.get('data_subtype', 'val2014')}_{str(row['image_id']).zfill(12)}.jpg", **row}
                for row in content["questions"]]
        sha256 = hash_files(config.questions)
    else:
        text = "question" if is_dataset(config.questions) else "text"
        rows, sha256 = read_rows(config.questions, ("question_id", "image", text), config.image_folder, config.split)
        rows = [{**row, "question": row[text].removesuffix(SHORT_ANSWER)} for row in rows]
    if config.annotations:
        content = read_json(config.annotations)
        if not isinstance(content, dict) or "annotations" not in content:
            raise UserError(f"{config.annotations}: no list `annotations`; name v2_mscoco_val2014_annotations.json")
        check_fields(content["annotations"], ("question_id", "answers", "answer_type", "question_type"),
                     config.annotations)
        annotations = {str(one["question_id"]): one for one in content["annotations"]}
        missing = [row["question_id"] for row in rows if str(row["question_id"]) not in annotations]
        if missing:
            raise UserError(f"{config.annotations} has no annotation of question {missing[0]} ({len(missing)} are "
                            f"missing); name the annotations of {config.questions}")
        rows = [{**row, **annotations[str(row["question_id"])]} for row in rows]
        files.append(config.annotations)
        sha256 = hash_files(*files)
    records = [{"id": str(row["question_id"]), "suite": "vqav2", "category": row.get("answer_type") or "default",
                "image": row["image"], "question_id": row["question_id"], "question": row["question"],
                "answers": annotator_answers(row.get("answers"), f"{files[-1]}, question {row['question_id']}"),
                "answer_type": row.get("answer_type"), "question_type": row.get("question_type")} for row in rows]
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    return record["question"] + (SHORT_ANSWER if suffix is None else suffix)


def parse(record: dict, rule: str = "official") -> dict[str, Any]:
    """The text that is compared (`normalised`) and what it earns: `accuracy` in percent, lmms_eval `score` of 1.

    official normalises nothing where the ten annotators agree to the letter.
    """
    check_rule(rule, RULES)
    answer, annotators = record["answer"], record["answers"]
    if rule == "lmms_eval":
        answer = normalise(answer, comma=COMMA_EVALAI)
        return {"normalised": answer,
                "score": vqa_accuracy(answer, [normalise(one, comma=COMMA_EVALAI) for one in annotators])}
    submitted = answer if rule == "official" else normalise_textvqa(answer)
    annotators = [without_breaks(one) for one in annotators]
    unanimous = len(set(annotators)) == 1
    answer = without_breaks(submitted)
    if not unanimous:
        answer, annotators = normalise(answer), [normalise(one) for one in annotators]
    parsed = {"normalised": answer, "accuracy": 100 * vqa_accuracy(answer, annotators)}
    return parsed | ({"answers_unanimous": unanimous} if rule == "official" else {"submitted": submitted})


def _values(rows: list[dict], rule: str) -> list[float]:
    name = "score" if rule == "lmms_eval" else "accuracy"
    return [0.0 if row["answer"] is None else parse(row, rule)[name] for row in rows]


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """`overall`, `perAnswerType` and `perQuestionType` in percent (lmms_eval: `exact_match` of 1)."""
    check_rule(rule, RULES)
    rows, warnings = last_answers(records)
    if not has_labels(rows, "answers"):
        return NO_LABELS
    missing = sum(row["answer"] is None for row in rows)
    if missing:
        warnings.append(f"{missing} {'question has' if missing == 1 else 'questions have'} no answer; LLaVA submits an "
                        f"empty string for {'it' if missing == 1 else 'them'}")
    values = _values(rows, rule)
    if rule == "lmms_eval":
        return with_warnings({"exact_match": mean(values)}, warnings)
    figures: dict[str, Any] = {"overall": mean(values)}
    for name, field in (("perAnswerType", "answer_type"), ("perQuestionType", "question_type")):
        kinds = dict.fromkeys(row[field] for row in rows)
        figures[name] = {kind: mean([value for row, value in zip(rows, values, strict=True) if row[field] == kind])
                         for kind in kinds}
    return with_warnings(figures, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = last_answers(records)[0]
    unit = 100 if rule == "lmms_eval" else 1
    return {"overall": to_points(rows, [unit * value for value in _values(rows, rule)])} \
        if has_labels(rows, "answers") else {}


def write_submission(records: list[dict], file: str | Path) -> None:
    """EvalAI's JSON, normalised as LLaVA's converter does; a question without an answer gets an empty one."""
    rows = last_answers(records)[0]
    write_json(file, [{"question_id": row["question_id"], "answer": normalise_textvqa(row["answer"] or "")}
                      for row in rows])
