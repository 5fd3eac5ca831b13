"""ScienceQA (Lu et al. 2022, arXiv 2209.09513), test: school questions with two to five choices; IMG: those with a
picture.

Files: a folder with `problems.json` and `pid_splits.json`, or lmms-lab/ScienceQA. LLaVA's `llava_test_CQM-A.json` holds
prompts that follow from these files and is not needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError
from eval_vlm.config import ScienceqaConfig
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
    read_json,
    read_rows,
    with_options,
)

LETTERS = "ABCDE"


def load(config: ScienceqaConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, a question twice, a label that is none of the choices.
    """
    folder = Path(config.questions)
    if (folder / "problems.json").is_file():
        files = (folder / "problems.json", folder / "pid_splits.json")
        problems, splits = (read_json(file) for file in files)
        for file, content, kind in zip(files, (problems, splits), (dict, list), strict=True):
            if not isinstance(content, dict) or not all(isinstance(one, kind) for one in content.values()):
                raise UserError(f"{file} is not ScienceQA's; get the file again")
        splits = {name: list(map(str, ids)) for name, ids in splits.items()}
        if config.split not in splits:
            raise UserError(f"{files[1]} has no split '{config.split}', only {', '.join(splits)}; set scienceqa.split")
        missing = [question_id for question_id in splits[config.split] if question_id not in problems]
        if missing:
            raise UserError(f"{files[0]} lacks question {missing[0]} of {files[1].name} ({len(missing)} are missing); "
                            "get both files again")
        rows = [problems[question_id] for question_id in splits[config.split]]
        check_fields(rows, ("question", "choices", "answer", "image"), files[0])
        rows = [{**row, "id": question_id} for question_id, row in zip(splits[config.split], rows, strict=True)]
        for row in rows:
            row["image"] = f"{row['id']}/{row['image']}" if row["image"] else None
        sha256 = hash_files(*files)
    else:
        rows, sha256 = read_rows(config.questions, ("question", "choices", "answer"), config.image_folder, config.split,
                                 config.subset)
        rows = [{"id": str(number), **row} for number, row in enumerate(rows)]
    records = []
    for row in rows:
        label = row["answer"]
        if label is not None and (not isinstance(label, int) or not 0 <= label < len(row["choices"])):
            raise UserError(f"{config.questions}, question {row['id']}: the label must be one of 0 to "
                            f"{len(row['choices']) - 1}, found {label!r}; correct it")
        if row.get("image") or not config.images_only:
            records.append({"id": str(row["id"]), "suite": "scienceqa",
                            "category": "img" if row.get("image") else "text", "image": row.get("image") or "",
                            "question_id": str(row["id"]), "question": row["question"], "hint": row.get("hint") or "",
                            "choices": row["choices"], "label": label, "has_image": bool(row.get("image"))})
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    context = f"Context: {record['hint']}\n" if record["hint"] else ""
    return context + with_options(record["question"], _choices(record)) + (OPTION_LETTER if suffix is None else suffix)


def _choices(record: dict) -> dict[str, str]:
    return dict(zip("ABCDEFGHIJ", record["choices"], strict=False))


def parse(record: dict, rule: str = "official") -> Any:
    """official: `{"parsed", "index", "correct"}`: exactly a letter, or `A. ...`, or one `The answer is A` with a
    character after it; else FAILED. lmms_eval: 1 or 0. vlmevalkit: `{"letter", "hit"}`.

    Raises:
        UserError: more than the five choices that the official script knows.
    """
    check_rule(rule)
    answer, label = record["answer"], record["label"]
    if rule == "vlmevalkit":
        letter = vlmevalkit_letter(answer, _choices(record)) or "Z"
        return {"letter": letter, "hit": int(letter == "ABCDEFGHIJ"[label])}
    if len(record["choices"]) > 5 and rule == "official":
        raise UserError(f"question {record['question_id']}: ScienceQA has at most five choices, found "
                        f"{len(record['choices'])}; correct the question file")
    if rule == "lmms_eval":
        answer, target = answer.strip(), "ABCDEFGHIJ"[label]
        if answer.lower() == target.lower():
            return 1.0
        return float(len(answer) >= 2 and answer[0].isupper() and answer[1] == "." and answer[0] == target)
    found = re.findall(r"The answer is ([A-Z]).", answer)
    if answer in tuple(LETTERS):
        letter = answer
    elif len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        letter = answer[0]
    else:
        letter = found[0] if len(found) == 1 else "FAILED"
    index = LETTERS.index(letter) if letter in tuple(LETTERS[:len(record["choices"])]) else -1
    return {"parsed": letter, "index": index, "correct": index == label}


def _right(row: dict, rule: str) -> float:
    if row["answer"] is None:
        return 0.0
    parsed = parse(row, rule)
    return float(parsed["correct"] if rule == "official" else parsed["hit"] if rule == "vlmevalkit" else parsed)


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """official: `accuracy` and `img_accuracy` in percent with their counts; a question without an answer is wrong in
    the total and left out of the picture figure. The toolkits' figures (of 1) leave it out."""
    check_rule(rule)
    rows, warnings = last_answers(records)
    if not has_labels(rows):
        return NO_LABELS
    warnings += count_missing(rows)
    answered = [row for row in rows if row["answer"] is not None]
    pictures = [_right(row, rule) for row in answered if row["has_image"]]
    if not pictures:
        warnings.append("no question with a picture")
    if rule == "official":
        right = [_right(row, rule) for row in rows]
        return with_warnings({"total": len(right), "correct": int(sum(right)), "accuracy": mean(right, 100),
                              "img_total": len(pictures), "img_correct": int(sum(pictures)),
                              "img_accuracy": mean(pictures, 100)}, warnings)
    right = [_right(row, rule) for row in answered]
    if rule == "vlmevalkit":
        return with_warnings({"all": mean(right), "with_image": mean(pictures)}, warnings)
    return with_warnings({"scienceqa": {"n": len(right), "exact_match": mean(right)},
                          "scienceqa_img": {"n": len(pictures), "exact_match": mean(pictures)}}, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = last_answers(records)[0]
    if not has_labels(rows):
        return {}
    answered = [row for row in rows if row["answer"] is not None]
    sets = {"accuracy": rows if rule == "official" else answered,
            "img_accuracy": [row for row in answered if row["has_image"]]}
    return {name: to_points(chosen, [100 * _right(row, rule) for row in chosen])
            for name, chosen in sets.items() if chosen}
